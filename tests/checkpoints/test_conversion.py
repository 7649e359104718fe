"""`convert` and `convert_last_bn`: folders that load, verify, and compute what their source did."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.datasets import ImageFolder

import condzoo
from condzoo.checkpoints import load_checkpoint, verify_checkpoint
from condzoo.checkpoints.folder import read_folder, write_sums
from condzoo.checkpoints.model_card import model_card
from condzoo.checkpoints.timm_sources import calibration_images
from condzoo.cli import main
from condzoo.commands.checkpoints import numbers
from condzoo.conversion import convert, convert_last_bn
from condzoo.data import BatchPlan, ImageData
from condzoo.data.arrays import LabelledImages
from condzoo.evaluating import checkpoint_images, evaluate_again
from condzoo.models import create_model


def made_up(name, path, **kwargs):
    """A network of timm's with drawn weights (biases and BatchNorm statistics too), saved as a state dict."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(model.get_classifier().bias)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    return model


@pytest.fixture
def photos(tmp_path):
    """An ImageFolder of 6 noisy images in 2 classes."""
    rng = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "photos" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_a_converted_network_is_evaluated_on_images_prepared_as_its_config_says(tmp_path, monkeypatch):
    """Of akamaster's networks, which took ImageNet's constants."""
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = LabelledImages(images, torch.arange(6))
    data = ImageData("cifar10", 10, split, split, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    monkeypatch.setattr("condzoo.evaluating.load_data", lambda *_, **__: data)
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "weights.pth")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    known = convert(tmp_path / "weights.pth", "cifar_resnet8", tag="known", out=tmp_path, mean=mean, std=std)
    (seen, _), *_ = checkpoint_images(read_folder(known), "cifar10", None).ordered_batches("test", BatchPlan(6))
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(seen, expected)
    assert evaluate_again(known, "cifar10").note == ""
    unknown = convert(tmp_path / "weights.pth", "cifar_resnet8", tag="unknown", out=tmp_path)
    assert evaluate_again(unknown, "cifar10").note.startswith("how its images were standardized is not known")


def test_class_folders_are_seen_by_a_converted_network_as_timm_would_show_them(tmp_path, photos):
    """Scale, crop, interpolation and constants, against timm's own transform."""
    for split in ("train", "val"):
        shutil.copytree(photos, tmp_path / "images" / split)
    made_up("resnet18", tmp_path / "weights.pth", num_classes=2)
    made = convert_last_bn(
        "timm/resnet18", weights=tmp_path / "weights.pth", tag="mine", out=tmp_path, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    config = json.loads((made / "config.json").read_text())
    config["pretrained_cfg"] |= {"interpolation": "bicubic", "crop_pct": 0.95}
    (made / "config.json").write_text(json.dumps(config))
    write_sums(made)
    model = load_checkpoint(made)
    data = checkpoint_images(read_folder(made), "imagefolder", tmp_path / "images")
    (seen, _), *_ = data.ordered_batches("test", BatchPlan(6))
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    expected = torch.stack([transform(image) for image, _ in ImageFolder(str(tmp_path / "images" / "val"))])
    torch.testing.assert_close(seen, expected, atol=2 / 255 / 0.25, rtol=0)
    shutil.rmtree(tmp_path / "images" / "train")
    assert evaluate_again(made, "imagefolder", tmp_path / "images").evaluation.total == len(expected)


def test_what_is_converted_lands_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("cifar_resnet8").state_dict(), "weights.pth")
    assert convert("weights.pth", "cifar_resnet8") == Path("converted/cifar_resnet8.converted")


def test_a_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("cifar_resnet8").state_dict(), "weights.pth")
    assert convert("~/weights.pth", "cifar_resnet8", out="~/mine") == tmp_path / "mine" / "cifar_resnet8.converted"
    made_up("test_vit", tmp_path / "vit.pth")
    assert convert_last_bn("timm/test_vit", weights="~/vit.pth", out="~/mine") == tmp_path / "mine/test_vit.converted"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("license", "line"), [("cc-by-nc-4.0", "license: cc-by-nc-4.0"), ("other: mine", 'license: "other: mine"')]
)
def test_a_cards_front_matter_is_yaml_whatever_the_license(license, line, tmp_path):
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "w.pth")
    _, card = config_and_card(convert(tmp_path / "w.pth", "cifar_resnet8", out=tmp_path / "out", license=license))
    assert line in card.split("\n")
    assert huggingface_hub.ModelCard(card).data.license == license


def test_a_pickled_network_becomes_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    source = create_model("cifar_resnet8", num_classes=7).eval()
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    made = convert(tmp_path / "weights.pth", "cifar_resnet8", tag="mine", out=tmp_path / "out", license="mit")
    assert made.name == "cifar_resnet8.mine"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_checkpoint(made)(x), source(x))
    assert torch.equal(timm.create_model(f"local-dir:{made}", pretrained=True).eval()(x), source(x))
    verification = verify_checkpoint(made)
    assert verification.ok, verification.rows
    card = (made / "README.md").read_text()
    assert "license: mit" in card
    assert "Made from weights.pth['model'] (SHA-256 " in card
    assert "from weights.pth" in (made.parent / "README.md").read_text()


@pytest.mark.parametrize(
    ("version", "known"), [(condzoo.__version__, False), ("0.0.1", None), (None, None), ("left out", None)]
)
def test_a_card_in_the_words_of_another_version_is_not_checked(tmp_path, version, known):
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "w.pth")
    made = convert(tmp_path / "w.pth", "cifar_resnet8", out=tmp_path / "out")
    record = json.loads((made / "conversion.json").read_text())
    assert record.pop("condzoo") == condzoo.__version__
    record |= {} if version == "left out" else {"condzoo": version}
    (made / "conversion.json").write_text(json.dumps(record))
    with (made / "README.md").open("a") as card:
        card.write("In other words.\n")
    write_sums(made)
    assert next(row.ok for row in verify_checkpoint(made).rows if row.check == "model card") is known


def test_what_a_notebook_has_set_does_not_reach_the_logits(tmp_path):
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "w.pth")
    with torch.autocast("cpu", torch.bfloat16):
        made = convert(tmp_path / "w.pth", "cifar_resnet8", out=tmp_path / "out")
    assert verify_checkpoint(made).ok


@pytest.mark.parametrize(("channels", "name"), [(1, "cifar_resnet8"), (4, "cifar_preresnet8_lastbn")])
def test_the_first_convolution_says_how_many_channels_images_have(tmp_path, channels, name):
    torch.manual_seed(0)
    source = create_model(name, in_chans=channels).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    made = convert(tmp_path / "weights.pth", name, out=tmp_path / "out")
    x = torch.randn(2, channels, 32, 32)
    assert torch.equal(load_checkpoint(made)(x), source(x))
    assert torch.equal(timm.create_model(f"local-dir:{made}", pretrained=True).eval()(x), source(x))
    assert verify_checkpoint(made).ok
    config, _ = config_and_card(made)
    assert config["input_size"] == [channels, 32, 32]
    assert config["mean"] == pytest.approx([(0.4914 + 0.4824 + 0.4467) / 3] * channels)
    given = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    config, _ = config_and_card(convert(tmp_path / "weights.pth", name, out=tmp_path / "out", tag="given", **given))
    assert (config["mean"], config["std"]) == ([0.5] * channels, [0.25] * channels)


def test_an_older_name_of_timms_is_converted_as_what_it_is_today(tmp_path, monkeypatch):
    monkeypatch.setattr("condzoo.models.timm_models.get_deprecated_models", lambda: {"older_vit": "test_vit.r160_in1k"})
    made_up("test_vit", tmp_path / "weights.pth")
    made = convert_last_bn("timm/older_vit", weights=tmp_path / "weights.pth", out=tmp_path / "out")
    assert made.name == "test_vit.converted"
    assert "from weights.pth['state_dict'] for timm/test_vit.r160_in1k" in config_and_card(made)[1]


def test_a_card_names_only_what_loads_it(tmp_path):
    """timm has no entry for a size that is not registered."""
    for name, by_timm in (("cifar_resnet8", True), ("mlp5x12", False)):
        torch.save(create_model(name).state_dict(), tmp_path / "w.pth")
        made = convert(tmp_path / "w.pth", name, out=tmp_path / "out")
        card = (made / "README.md").read_text()
        assert f'condzoo.load_checkpoint("FOLDER/{name}.converted")' in card
        assert ("timm.create_model" in card) == by_timm == timm.is_model(name)


def test_weights_that_the_hub_does_not_give_are_one_line(tmp_path, monkeypatch):
    def refuse(name, **_):
        raise OSError(
            f"404 Client Error. (Request ID: 7)\n\nRepository Not Found for url: https://hub/{name}.\nLog in."
        )

    monkeypatch.setattr("condzoo.models.timm_models.timm.create_model", refuse)
    with pytest.raises(
        OSError, match=r"^the weights of 'test_vit' did not come from the Hub: 404 Client Error\.[^\n]*$"
    ):
        convert_last_bn("timm/test_vit", out=tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_unknown_model_gets_the_closest_name(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"did you mean .*cifar_resnet20"):
        convert(tmp_path / "w.pth", "cifar_resnt20", out=tmp_path)


@pytest.mark.parametrize(
    ("name", "calibrated"),
    [
        ("resnet18", False),
        ("convnext_atto", True),
        ("test_vit", False),
        ("test_vit", True),
        ("ghostnet_050", True),  # with dropout by a function call unless built without
    ],
)
def test_a_last_bn_twin_is_the_same_function(tmp_path, photos, name, calibrated):
    plain = made_up(name, tmp_path / "weights.pth")
    made = convert_last_bn(
        f"timm/{name}",
        weights=tmp_path / "weights.pth",
        calibrate=photos if calibrated else None,
        out=tmp_path / "out",
        tag="lastbn",
    )
    assert made.name == ("resnet18_lastbn.lastbn" if name == "resnet18" else f"{name}.lastbn")
    twin = load_checkpoint(made)
    x = torch.randn(2, *timm.data.resolve_data_config({}, model=plain)["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(twin(x), plain(x), rtol=1e-5, atol=1e-5)
    assert (twin.last_bn.running_mean.abs().max() > 0) == calibrated
    assert verify_checkpoint(made).ok


# names of today's timm -> those of the authors of ConvNeXt, in this order
AUTHORS_NAMES = {
    r"^stem\.": "downsample_layers.0.",
    r"\.blocks\.": ".",
    r"stages\.(\d)\.downsample": r"downsample_layers.\1",
    r"conv_dw": "dwconv",
    r"mlp\.fc": "pwconv",
    r"^head\.fc": "head",
    r"^head\.norm": "norm",
}


def test_the_names_that_timm_takes_for_a_network_are_taken(tmp_path):
    """timm renames as it reads a file: those of its authors, and of its own older versions."""
    plain = made_up("test_convnext", tmp_path / "weights.pth", num_classes=7)
    state = plain.state_dict()
    for ours, theirs in AUTHORS_NAMES.items():
        state = {re.sub(ours, theirs, key): value for key, value in state.items()}
    assert "downsample_layers.0.0.weight" in state
    assert "head.weight" in state
    torch.save({"model": state}, tmp_path / "theirs.pth")
    made = convert_last_bn("timm/test_convnext", weights=tmp_path / "theirs.pth", out=tmp_path / "out")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(made)(x), plain(x), rtol=1e-5, atol=1e-5)
    assert "from theirs.pth['model'] for timm/test_convnext" in config_and_card(made)[1]
    del state["norm.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth: '[\w.]+' is missing; the network has it"):
        convert_last_bn("timm/test_convnext", weights=tmp_path / "part.pth", out=tmp_path / "out", tag="part")


def test_a_network_that_timm_fills_in_part_is_refused(tmp_path):
    """timm loads DLA's weights without asking that all be there."""
    torch.save({"fc.weight": torch.zeros(1000, 256, 1, 1)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth: 'base_layer\.0\.weight' is missing; the network has it"):
        convert_last_bn("timm/dla46_c", weights=tmp_path / "part.pth", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet18"])
def test_grey_weights_for_a_twin_are_calibrated_on_grey_images(tmp_path, photos, name):
    plain = made_up(name, tmp_path / "weights.pth", in_chans=1)
    made = convert_last_bn(f"timm/{name}", weights=tmp_path / "weights.pth", calibrate=photos, out=tmp_path / "out")
    twin, (config, card) = load_checkpoint(made), config_and_card(made)
    size = config["input_size"]
    x = torch.randn(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), plain(x), rtol=1e-5, atol=1e-5)
    assert twin.last_bn.running_mean.abs().max() > 0
    assert size[0] == 1 == len(config["mean"])
    assert config.get("test_input_size", size)[0] == 1
    assert "Not known: nothing in the source says it" in card
    assert verify_checkpoint(made).ok


def test_weights_for_images_that_files_do_not_hold_are_not_calibrated(tmp_path, photos):
    made_up("test_efficientnet", tmp_path / "weights.pth", in_chans=5)
    with pytest.raises(ValueError, match="images in files have 3 channels, or are made grey; these weights take 5"):
        convert_last_bn("timm/test_efficientnet", weights=tmp_path / "weights.pth", calibrate=photos, out=tmp_path)


def test_the_command_makes_a_calibrated_twin(tmp_path, photos):
    plain, weights = made_up("test_vit", tmp_path / "weights.pth"), str(tmp_path / "weights.pth")
    options = ["--weights", weights, "--calibrate", str(photos), "--tag", "mine", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["convert", "timm/test_vit", "--last-bn", *options])
    assert not stop.value.code
    twin = load_checkpoint(tmp_path / "out" / "test_vit.mine")
    x = torch.randn(2, *timm.data.resolve_data_config({}, model=plain)["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(twin(x), plain(x), rtol=1e-5, atol=1e-5)
    assert twin.last_bn.running_mean.abs().max() > 0


def test_calibration_standardizes_the_classifier_s_input(tmp_path, photos):
    plain = made_up("resnet18", tmp_path / "weights.pth")
    made = convert_last_bn("timm/resnet18", weights=tmp_path / "weights.pth", calibrate=photos, out=tmp_path)
    twin = load_checkpoint(made)
    (batch,) = calibration_images(plain.pretrained_cfg, photos, 1024)
    with torch.no_grad():
        h = twin.forward_head(twin.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(h.mean(0), torch.zeros(512), rtol=0, atol=1e-3)
    spread = h.var(0, unbiased=False)
    assert spread.median().item() == pytest.approx(1, abs=1e-2)
    assert isinstance(twin, type(condzoo.create_model("resnet18_lastbn")))


def test_the_images_asked_for_are_spread_over_the_folder(photos):
    model = timm.create_model("test_vit").eval()
    few, all_ = (torch.cat(calibration_images(model.pretrained_cfg, photos, n)) for n in (3, 99))
    assert (len(few), len(all_)) == (3, 6)
    assert torch.equal(few, all_[::2])


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    model = timm.create_model("test_vit")
    with pytest.raises(ValueError, match="is no folder of images, one folder a class"):
        calibration_images(model.pretrained_cfg, tmp_path / "empty", 10)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm/resnet51", "; did you mean 'timm/resnet5"),
        ("cifar_resnet20", "; for condzoo's own: condzoo convert FILE --model cifar_resnet20_lastbn"),
        ("timm/cifar_resnet20_lastbn", "; for condzoo's own: condzoo convert FILE --model cifar_resnet20_lastbn"),
        ("mlp8x24_bn", r"has them\)$"),
    ],
)
def test_only_timms_own_networks_are_taken(tmp_path, name, hint):
    with pytest.raises(ValueError, match="is not a model of timm's; give one as timm/resnet50.*" + hint):
        convert_last_bn(name, out=tmp_path)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def in_16_bits(path):
    Image.fromarray(np.full((40, 50), 60_000, dtype=np.uint16)).save(path)


@pytest.mark.parametrize(("damage", "fault"), [(cut_in_half, "cannot be read"), (in_16_bits, "convert it to 8 bits")])
def test_an_image_of_a_calibration_folder_that_cannot_be_used_is_named(photos, damage, fault):
    damage(photos / "class1" / "3.png")
    with pytest.raises(ValueError, match=rf"class1/3\.png.*{fault}"):
        calibration_images(timm.get_pretrained_cfg("test_vit").to_dict(), photos, 10)


def test_a_calibration_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder of images, one folder a class: it does not exist"):
        calibration_images(timm.get_pretrained_cfg("test_vit").to_dict(), tmp_path / "nowhere", 10)


def test_weights_of_another_network_name_the_key(tmp_path):
    torch.save({"stem.conv.weight": torch.ones(2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"'stem.conv.weight' is \[2\] float32, the network's is \[24, 3, 3, 3\]"):
        convert_last_bn("timm/test_byobnet", weights=tmp_path / "weights.pth", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_for_a_twin_may_be_as_old_and_of_as_many_classes_as_any(tmp_path):
    plain = made_up("test_byobnet", tmp_path / "weights.pth", num_classes=7).half().float()
    state = {k: v.half() for k, v in plain.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    made = convert_last_bn("timm/test_byobnet", weights=tmp_path / "weights.pth", out=tmp_path / "out")
    x = torch.randn(2, *plain.pretrained_cfg["input_size"])
    torch.testing.assert_close(load_checkpoint(made)(x), plain(x), rtol=1e-5, atol=1e-5)


def config_and_card(made):
    return json.loads((made / "config.json").read_text())["pretrained_cfg"], (made / "README.md").read_text()


def test_what_is_given_of_a_files_origin_stands_in_config_and_card(tmp_path):
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "w.pth")
    given = {"license": "mit", "mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 1.0)}
    config, card = config_and_card(convert(tmp_path / "w.pth", "cifar_resnet8", out=tmp_path, tag="given", **given))
    assert (config["license"], config["mean"], config["std"]) == ("mit", [0.25, 0.5, 0.75], [0.5, 0.5, 1.0])
    assert (
        "centre crop to 32 x 32; scale to [0, 1], subtract 0.2500, 0.5000, 0.7500, divide by 0.5000, 0.5000, 1.0000."
        in card
    )
    config, card = config_and_card(convert(tmp_path / "w.pth", "cifar_resnet8", out=tmp_path, tag="bare"))
    assert config["license"] == "unknown"
    assert "Not known: nothing in the source says it. What is usual for this network: Scale the shorter side" in card


@pytest.mark.parametrize(
    "given",
    [
        {"mean": (0.5, 0.5, 0.5)},
        {"mean": (0.5,), "std": (1.0,)},
        {"mean": (0.5, 0.5, 0.5), "std": (1.0, 0.0, 1.0)},
        {"mean": (float("nan"), 0.5, 0.5), "std": (1.0, 1.0, 1.0)},
    ],
)
def test_mean_and_std_are_one_number_a_channel(tmp_path, given):
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="mean and std are 3 finite numbers each"):
        convert(tmp_path / "w.pth", "cifar_resnet8", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_mean_and_std(tmp_path):
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "w.pth")
    command = ["convert", str(tmp_path / "w.pth"), "--model", "cifar_resnet8", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--mean", "0.1,0.2,0.3", "--std", "1,1,1"])
    assert not stop.value.code
    assert config_and_card(tmp_path / "out" / "cifar_resnet8.converted")[0]["mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"--mean takes numbers with commas between them, got '0\.1;0\.2'"):
        numbers("--mean", "0.1;0.2")


def test_a_twin_keeps_timms_license_and_preprocessing(tmp_path, monkeypatch):
    source = "resnet18.fb_ssl_yfcc100m_ft_in1k"
    theirs = timm.get_pretrained_cfg(source)
    monkeypatch.setattr(
        "condzoo.checkpoints.timm_sources.create_timm_model", lambda name, pretrained: timm.create_model(name)
    )
    config, card = config_and_card(convert_last_bn(f"timm/{source}", out=tmp_path))
    assert config["license"] == theirs.license == "cc-by-nc-4.0"
    assert "license: cc-by-nc-4.0" in card
    for field in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        assert config[field] == (list(value) if isinstance(value := getattr(theirs, field), tuple) else value)
    assert (
        "## Preprocessing\nScale the shorter side to 256 pixels (bilinear); centre crop to 224 x 224; scale to" in card
    )


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("squash", "Scale to 180 x 180 pixels, whatever the image's shape (bicubic)"),
        ("border", "Scale the longer side to 180 pixels and pad the shorter one (bicubic)"),
    ],
)
def test_a_card_says_how_timm_crops(mode, words, tmp_path):
    made_up("test_vit", tmp_path / "weights.pth")
    made = convert_last_bn("timm/test_vit", weights=tmp_path / "weights.pth", out=tmp_path)
    config = json.loads((made / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_mode": mode, "crop_pct": 0.8888, "interpolation": "bicubic"}
    config["pretrained_cfg"]["input_size"] = [3, 160, 160]
    (made / "config.json").write_text(json.dumps(config))
    write_sums(made)
    assert f"{words}; centre crop to 160 x 160; scale to [0, 1]" in model_card(read_folder(made))


def test_of_weights_in_a_file_timms_license_says_nothing(tmp_path):
    made_up("test_vit", tmp_path / "weights.pth")
    config, card = config_and_card(convert_last_bn("timm/test_vit", weights=tmp_path / "weights.pth", out=tmp_path))
    assert config["license"] == "unknown"
    assert "Not known" in card
