"""Checkpoints by path and by name: where they are looked for, what is checked, what timm's users do with them."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import condzoo
from condzoo.checkpoints import load_checkpoint, verify_checkpoint, verify_released
from condzoo.checkpoints.folder import read_folder, write_sums
from condzoo.checkpoints.loading import read_checkpoint
from condzoo.checkpoints.writing import serialize
from condzoo.data import BatchPlan, load_data
from condzoo.evaluating import evaluate_again
from condzoo.models import create_model, released
from condzoo.models.weight_files import parse_weights
from condzoo.probe import measure
from condzoo.probing import Question, answer

NAME = "mlp4x24_bn.digits"


def stored(checkpoint):
    return parse_weights((checkpoint / "model.safetensors").read_bytes(), "file")


def equal_states(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)


def test_tensors_in_one_memory_are_written_whole():
    """Modules and weights with two names, views that overlap and that do not, what is not contiguous."""
    model = create_model("mlp4x24", num_classes=10, input_size=(1, 8, 8))
    model.layers[2] = model.layers[1]
    whole = torch.arange(24.0).reshape(4, 6)
    for name, view in {
        "all": whole,
        "rows": whole[1:3],
        "next": whole[2:],
        "turned": whole.t(),
        "none": whole[:0],
    }.items():
        model.register_buffer(name, view)
    assert equal_states(model, parse_weights(serialize(model), "file"))


@pytest.mark.parametrize("form", [lambda p: p, str, lambda p: p / "model.safetensors", lambda p: f"{p}/"])
def test_a_folder_loads_by_any_path_to_it(checkpoint, form):
    model = load_checkpoint(form(checkpoint))
    assert equal_states(model, stored(checkpoint))
    assert not model.training


def test_timm_loads_the_same_folder(checkpoint, images):
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).eval()
    assert torch.equal(model(images), load_checkpoint(checkpoint)(images))
    assert (
        model.pretrained_cfg["mean"] == json.loads((checkpoint / "config.json").read_text())["pretrained_cfg"]["mean"]
    )


@pytest.mark.parametrize("name", [NAME, "mlp4x24_bn"])
@pytest.mark.parametrize("create", [create_model, timm.create_model])
def test_a_released_name_loads_from_the_index(index, checkpoint, name, create):
    assert equal_states(create(name, pretrained=True), stored(checkpoint))
    assert equal_states(load_checkpoint(name), stored(checkpoint))
    assert equal_states(create_model("mlp4x24_bn", pretrained=True).train(), stored(checkpoint))


def test_a_path_may_begin_at_the_users_home(checkpoint, monkeypatch):
    """As data roots and CONDZOO_CACHE may."""
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    for path in (f"~/{NAME}", Path("~") / NAME / "model.safetensors"):
        assert equal_states(load_checkpoint(path), stored(checkpoint))
        assert condzoo.verify_checkpoint(path).path == checkpoint


def test_by_name_or_path_a_network_is_described_in_timms_types(index, checkpoint):
    """Tuples, as for a network with new weights: `pretrained_cfg["input_size"] == (1, 12, 12)`."""
    networks = (create_model("mlp4x24_bn"), create_model(NAME, pretrained=True), load_checkpoint(checkpoint))
    for key in ("input_size", "mean", "std"):
        assert {type(network.pretrained_cfg[key]) for network in networks} == {tuple}
    assert {network.pretrained_cfg["input_size"] for network in networks} == {(1, 12, 12)}
    assert networks[1].pretrained_cfg["mean"] == networks[2].pretrained_cfg["mean"]


def test_the_index_is_listed(index):
    assert condzoo.list_checkpoints() == [NAME]


def test_a_loaded_model_does_not_drag_its_weights_along(index):
    config = create_model(NAME, pretrained=True).pretrained_cfg
    assert "state_dict" not in config
    assert (config["architecture"], config["tag"]) == ("mlp4x24_bn", "digits")


@pytest.mark.parametrize("feature_cls", ["list", "hook", "getter"])
def test_features_do_not_drag_the_weights_along(index, feature_cls):
    model = timm.create_model(NAME, pretrained=True, features_only=True, feature_cls=feature_cls)
    assert not any("state_dict" in (getattr(part, "pretrained_cfg", None) or {}) for part in model.modules())


def test_a_package_that_was_installed_as_links_has_its_checkpoints(index, checkpoint, images):
    """As uv (--link-mode symlink) and Bazel install them; a folder that is given by its path has none."""
    folder = released.cache_folder() / NAME
    for file in list(folder.iterdir()):
        file.unlink()
        file.symlink_to(checkpoint / file.name)
    assert torch.equal(load_checkpoint(NAME)(images), load_checkpoint(checkpoint)(images))
    assert read_checkpoint(NAME).files == read_folder(checkpoint).files
    found = verify_checkpoint(NAME)
    assert found.ok, found.rows
    with pytest.raises(ValueError, match="is a symbolic link; a checkpoint's files must be plain files"):
        load_checkpoint(folder)
    assert not verify_checkpoint(folder).ok


def test_another_number_of_classes_keeps_the_body_and_has_a_new_head(index, checkpoint):
    model = create_model("mlp4x24_bn", pretrained=True, num_classes=3)
    state = stored(checkpoint)
    assert model.fc.weight.shape == (3, 24)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if not k.startswith("fc."))


def test_features_out_and_features_only(index, checkpoint, images):
    features = create_model("mlp4x24_bn", pretrained=True, num_classes=0).eval()(images)
    full = load_checkpoint(checkpoint)
    assert torch.equal(features, full.forward_head(full.forward_features(images), pre_logits=True))
    levels = timm.create_model("mlp4x24_bn", pretrained=True, features_only=True).eval()(images)
    assert torch.equal(levels[-1], full.forward_features(images))


def test_more_channels_see_equal_channels_as_the_one_they_were_trained_on(index, checkpoint, images):
    three = create_model("mlp4x24_bn", pretrained=True, in_chans=3).eval()
    torch.testing.assert_close(three(images.expand(-1, 3, -1, -1)), load_checkpoint(checkpoint)(images))


@pytest.fixture
def convolutional(tmp_path, monkeypatch):
    """A released cifar_resnet8_lastbn, in the cache only: (its network, images)."""
    torch.manual_seed(0)
    network = create_model("cifar_resnet8_lastbn").eval()
    network.last_bn.running_mean.normal_()
    folder = tmp_path / "cache" / "checkpoints" / "cifar_resnet8_lastbn.test"
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    digest = released.sha256((folder / "model.safetensors").read_bytes())
    (tmp_path / "index.toml").write_text(
        f'["{folder.name}"]\nsha256 = "{digest}"\ndefault = true\nmean = [0.1, 0.2, 0.3]\nstd = [1.0, 2.0, 3.0]\n'
    )
    monkeypatch.setattr(released, "INDEX", tmp_path / "index.toml")
    monkeypatch.setenv(released.CACHE_VARIABLE, str(tmp_path / "cache"))
    return network, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("create", [create_model, timm.create_model])
def test_a_convolutional_release_takes_other_classes_channels_and_gives_features(convolutional, create):
    network, x = convolutional
    name = "cifar_resnet8_lastbn"
    assert torch.equal(create(name, pretrained=True).eval()(x), network(x))
    assert list(create(name, pretrained=True).pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    few = create(name, pretrained=True, num_classes=3).eval()
    assert few(x).shape == (2, 3)
    assert torch.equal(few.forward_features(x), network.forward_features(x))
    assert torch.equal(few.last_bn.running_mean, network.last_bn.running_mean)
    grey = create(name, pretrained=True, in_chans=1).eval()
    assert torch.equal(grey.conv1.weight, network.conv1.weight.sum(1, keepdim=True))  # as timm does it
    torch.testing.assert_close(grey(x[:, :1]), network(x[:, :1].expand(-1, 3, -1, -1)))
    levels = create(name, pretrained=True, features_only=True).eval()(x)
    assert [level.shape[1] for level in levels] == [16, 32, 64]
    assert torch.equal(levels[-1], network.forward_features(x))


@pytest.mark.parametrize("create", [create_model, timm.create_model])
def test_another_pooling_makes_the_last_bn_as_new_as_the_head(convolutional, create):
    """As timm's own: with other classes the body loads, with the same ones the classifier does not fit."""
    network, x = convolutional
    model = create("cifar_resnet8_lastbn", pretrained=True, num_classes=3, global_pool="catavgmax").eval()
    assert torch.equal(model.forward_features(x), network.forward_features(x))
    assert model.last_bn.num_features == 128
    assert torch.equal(model.last_bn.running_var, torch.ones(128))
    assert model(x).shape == (2, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        create("cifar_resnet8_lastbn", pretrained=True, global_pool="catavgmax")


def test_an_mlps_weights_refuse_other_image_sizes(index):
    with pytest.raises(ValueError, match=r"take images of 1 x 12 x 12, got input_size=\(1, 28, 28\); an MLP's"):
        create_model("mlp4x24_bn", pretrained=True, input_size=(1, 28, 28))


def test_the_first_place_that_has_it_counts(index, checkpoint, tmp_path, monkeypatch):
    repository, cache = tmp_path / "repository", released.cache_folder()
    shutil.copytree(checkpoint, repository / NAME)
    monkeypatch.setattr(released, "checkpoint_folders", lambda: [tmp_path / "none", repository, cache])
    assert released.find_folder(released.find_release("mlp4x24_bn", "digits")) == repository / NAME


def test_a_cache_that_cannot_be_looked_into_is_one_that_lacks_it(index, monkeypatch):
    """The home of another user, say: every import asks where releases are."""
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(released.cache_folder())):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    release = released.find_release("mlp4x24_bn", "digits")
    assert released.find_folder(release) is None
    assert released.weights_path(release) == released.cache_folder() / NAME / "model.safetensors"


def test_the_cache_follows_its_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDZOO_CACHE", str(tmp_path / "own"))
    assert released.cache_folder() == tmp_path / "own" / "checkpoints"
    monkeypatch.delenv("CONDZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert released.cache_folder() == tmp_path / "xdg" / "condzoo" / "checkpoints"


def test_a_file_of_another_hash_is_refused_by_name_even_where_its_own_sums_hold(index):
    folder = released.cache_folder() / NAME
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    for load in (load_checkpoint, lambda name: timm.create_model(name, pretrained=True)):
        with pytest.raises(ValueError, match=rf"is not the file released as {NAME}: its SHA-256 is .* released was"):
            load(NAME)


@pytest.mark.parametrize("form", [dict, lambda config: timm.models.PretrainedCfg(**config)])
def test_timms_own_config_of_a_release_stands_for_its_name(index, checkpoint, monkeypatch, form):
    """As timm's scripts hand `model.pretrained_cfg` back: checked by the index, and fetched where it is not here."""
    config = create_model(NAME, pretrained=True).pretrained_cfg | {"mean": (0.25,)}
    folder = released.cache_folder() / NAME

    def build():
        return timm.create_model("mlp4x24_bn", pretrained=True, pretrained_cfg=form(config))

    assert equal_states(build(), stored(checkpoint))
    assert build().pretrained_cfg["mean"] == (0.25,)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"is not the file released as {NAME}: its SHA-256 is"):
        build()
    shutil.rmtree(folder)
    monkeypatch.setattr(released, "download", lambda repository, target: shutil.copytree(checkpoint, target))
    assert equal_states(build(), stored(checkpoint))


def test_weights_that_a_config_names_elsewhere_are_the_callers_own(index, checkpoint, tmp_path):
    state = stored(checkpoint)
    state["fc.weight"] += 1
    save_file(state, tmp_path / "own.safetensors")
    config = create_model(NAME, pretrained=True).pretrained_cfg
    for own in (
        {"pretrained_cfg": config | {"file": str(tmp_path / "own.safetensors")}},
        {"pretrained_cfg": config | {"state_dict": state}},
        {"pretrained_cfg": config, "pretrained_cfg_overlay": {"file": str(tmp_path / "own.safetensors")}},
    ):
        assert equal_states(timm.create_model("mlp4x24_bn", pretrained=True, **own), state)


def test_an_empty_config_is_none(index, checkpoint):
    """As for timm's own networks."""
    for create in (create_model, timm.create_model):
        assert equal_states(create("mlp4x24_bn", pretrained=True, pretrained_cfg={}), stored(checkpoint))


@pytest.mark.parametrize("use", [evaluate_again, lambda name: answer(Question(name, batches=1))])
def test_a_release_with_other_weights_is_neither_evaluated_nor_measured(index, use):
    """A folder whose own sums hold, under a released name."""
    folder = released.cache_folder() / NAME
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"sha256": released.sha256(content)}))
    write_sums(folder)
    with pytest.raises(ValueError, match=rf"is not the file released as {NAME}: its SHA-256 is"):
        use(NAME)


def test_a_name_is_the_release_whatever_lies_in_the_working_directory(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NAME, "mlp4x24_bn"):
        (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for name in (NAME, "mlp4x24_bn"):
        load_checkpoint(name)
        with pytest.raises(ValueError, match=r"neither a checkpoint \(no SHA256SUMS\) nor a run"):
            load_checkpoint(f"./{name}")


def test_a_folder_of_checkpoints_is_answered_by_their_names(checkpoint):
    with pytest.raises(ValueError, match=f"it is no checkpoint, but holds {checkpoint.name}$"):
        load_checkpoint(checkpoint.parent)


def test_weights_load_whatever_the_default_dtype_is(index, checkpoint, images):
    expected = load_checkpoint(NAME)(images)
    torch.set_default_dtype(torch.float64)
    try:
        for model in (load_checkpoint(NAME), load_checkpoint(checkpoint), create_model(NAME, pretrained=True).eval()):
            assert next(model.parameters()).dtype == torch.float64
            torch.testing.assert_close(model(images.double()).float(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_good_folder_is_good_where_the_default_is_half_precision(index, checkpoint, monkeypatch, dtype):
    monkeypatch.setattr("condzoo.checkpoints.loading.OTHER_FUNCTION", 1e-4)  # what half precision does not keep
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in stored(checkpoint).items()}
    torch.set_default_dtype(dtype)
    try:
        assert equal_states(load_checkpoint(checkpoint), state)
        verifications = verify_checkpoint(checkpoint), *verify_released()
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(verification.ok for verification in verifications), verifications


def test_a_network_from_a_folder_is_described_as_the_folder_says(checkpoint):
    """And not as the model's default release."""
    config = json.loads((checkpoint / "config.json").read_text())["pretrained_cfg"]
    edited = json.loads((checkpoint / "config.json").read_text())
    edited["pretrained_cfg"]["file"] = "/etc/hostname"
    (checkpoint / "config.json").write_text(json.dumps(edited))
    write_sums(checkpoint)
    model = load_checkpoint(checkpoint)
    assert model.pretrained_cfg is model.default_cfg
    assert (model.pretrained_cfg["architecture"], model.pretrained_cfg["tag"]) == ("mlp4x24_bn", "digits")
    assert [list(model.pretrained_cfg[key]) for key in ("mean", "std")] == [config["mean"], config["std"]]
    assert "file" not in model.pretrained_cfg


def test_new_weights_have_the_tables_sizes_whatever_was_released(monkeypatch):
    """A first release on other data must not change what the bare name builds."""
    other = dataclasses.replace(timm.get_pretrained_cfg("cifar_resnet8"), num_classes=7, input_size=(1, 28, 28))
    monkeypatch.setattr("timm.models._builder.get_pretrained_cfg", lambda name: other)
    for create in (create_model, timm.create_model):
        model = create("cifar_resnet8")
        assert (model.num_classes, model.conv1.in_channels) == (10, 3)
        assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_weights_of_another_shape_name_the_first_key(index, monkeypatch):
    state = create_model("mlp4x24_bn", num_classes=7).state_dict()
    monkeypatch.setattr("condzoo.models.pretrained.read_release", lambda release: state)
    with pytest.raises(
        ValueError, match=rf"{NAME}: 'fc.weight' is \[7, 24\] float32, the network's is \[10, 24\] float32"
    ):
        create_model("mlp4x24_bn", pretrained=True)


def test_what_is_nowhere_comes_from_the_hub_and_stays_in_the_cache(index, checkpoint, monkeypatch):
    shutil.rmtree(released.cache_folder() / NAME)
    asked = []

    def stand_in(repository, folder):
        asked.append(repository)
        shutil.copytree(checkpoint, folder)

    monkeypatch.setattr(released, "download", stand_in)
    for _ in range(2):
        assert equal_states(load_checkpoint(NAME), stored(checkpoint))
    assert asked == [f"{released.HUB_OWNER}/{NAME}"]
    assert condzoo.verify_checkpoint(NAME).ok


def test_a_cache_that_cannot_be_written_is_named_with_what_names_another(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(released.CACHE_VARIABLE, str(tmp_path / "file"))
    for load in (load_checkpoint, lambda name: timm.create_model(name, pretrained=True)):
        with pytest.raises(OSError, match=rf"{NAME} is not here and .*; name another by CONDZOO_CACHE: '.*/file/check"):
            load(NAME)


def test_a_wrong_download_is_not_kept(index, monkeypatch):
    shutil.rmtree(released.cache_folder() / NAME)

    def stand_in(repository, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"something else")

    monkeypatch.setattr(released, "download", stand_in)
    with pytest.raises(ValueError, match="is not the released file"):
        load_checkpoint(NAME)
    assert list(released.cache_folder().iterdir()) == []


def test_without_the_hub_the_error_says_where_it_looked(index, monkeypatch):
    shutil.rmtree(released.cache_folder() / NAME)

    def unreachable(*arguments):
        raise ConnectionError("no route")

    monkeypatch.setattr(released, "download", unreachable)
    with pytest.raises(FileNotFoundError, match=rf"{NAME} is in none of .*checkpoints.*, and the Hub .*: no route"):
        load_checkpoint(NAME)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18_lastbn", r"no weights .* resnet18_lastbn yet; .*`condzoo convert --last-bn timm/resnet18 "),
        (
            "cifar_resnet32_lastbn",
            r"`condzoo train cifar10/resnet20_lastbn --set model.name=cifar_resnet32_lastbn` trains",
        ),
        ("cifar_resnet20_lastbn", r"`condzoo train cifar10/resnet20_lastbn` trains it"),
        ("preresnet50", r"condzoo.list_models\(pretrained=True\) lists"),
    ],
)
def test_a_name_without_a_release_says_what_makes_one(index, name, message, tmp_path, monkeypatch):
    for recipe in ("cifar10/deeper/a", "cifar10/resnet20_lastbn"):
        file = tmp_path / "source" / "recipes" / f"{recipe}.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('[model]\nname = "cifar_resnet20_lastbn"\n')
    (file.parent / "broken.toml").write_text("[model")
    monkeypatch.setattr(released, "PACKAGE", tmp_path / "source" / "condzoo")
    for load in (load_checkpoint, lambda n: create_model(n, pretrained=True)):
        with pytest.raises(ValueError, match=message):
            load(name)


def test_an_unknown_tag_gets_the_closest(index):
    for load in (load_checkpoint, timm.create_model, create_model):
        with pytest.raises(ValueError, match=rf"unknown tag 'digit' of mlp4x24_bn; did you mean {NAME}\?"):
            load("mlp4x24_bn.digit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp4x24_bm", "unknown model 'mlp4x24_bm'; did you mean"),
        ("", "unknown model ''"),
        ("mlp12x64", "no weights are released for 'mlp12x64': it is not one of the registered models"),
        ("mlp12x64.mnist", "no weights are released for 'mlp12x64.*': it is not one of the registered models"),
    ],
)
def test_an_unknown_name_gets_the_closest(index, name, message):
    for load in (load_checkpoint, condzoo.verify_checkpoint):
        with pytest.raises(ValueError, match=message):
            load(name)


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_tag_of_a_size_that_is_not_registered_is_none(pretrained):
    with pytest.raises(ValueError, match=r"no weights are released for 'mlp12x64\.mnist': it is not one of the regist"):
        create_model("mlp12x64.mnist", pretrained=pretrained)


def test_a_run_directory_is_told_apart(runs):
    with pytest.raises(ValueError, match=r"is a run directory; `condzoo release .* --tag TAG` makes a checkpoint"):
        load_checkpoint(runs[0])


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_probe_measures_the_weights_that_a_tag_or_folder_names(index, checkpoint):
    """And not new ones of the same network."""
    of_tag, of_folder = (answer(Question(target, batches=1)) for target in (checkpoint.name, str(checkpoint)))
    new = answer(Question("mlp4x24_bn", data="digits", batches=1))
    model = load_checkpoint(checkpoint).train()
    images = load_data("digits", resize=12)
    x, y = next(images.train_batches(BatchPlan(128, seed=0), epoch=0))
    expected = measure(model, (x, y))["fc"]
    for found in (of_tag, of_folder):
        assert torch.equal(found["fc"].input.eigenvalues, expected.input.eigenvalues)
        assert found["fc"].weight == expected.weight != new["fc"].weight
