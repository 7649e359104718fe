"""`release`: what it makes of finished runs, and every reason it refuses one."""

import json
import math
import shutil
import tomllib
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from condzoo.catalog import list_models
from condzoo.checkpoints import verify_checkpoint
from condzoo.checkpoints.folder import ALWAYS, SUMS, TRAINED, read_folder, write_sums
from condzoo.checkpoints.model_card import preprocessing, results
from condzoo.checkpoints.overview import Row, checkpoints_table, natural_order, pairs_section
from condzoo.checkpoints.records import Config, Metrics
from condzoo.checkpoints.writing import add_to_index, refresh_cards
from condzoo.models import released
from condzoo.probe.serialization import from_record
from condzoo.release import release, released_before
from condzoo.release.checks import check_evaluation, same_arithmetic
from condzoo.release.records import described_data, header_fields, input_fields, repository_recipe
from condzoo.training import load_recipe, load_run
from condzoo.training.data_sets import centre_share, read_data
from condzoo.training.schema import DataSection


def edit_json(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_release_has_every_file_of_the_format_and_no_other(made_checkpoint):
    assert {path.name for path in made_checkpoint.iterdir()} == {*ALWAYS, *TRAINED, SUMS}
    assert len((made_checkpoint / "conditioning.png").read_bytes()) > 1000, "drawn, as in no other test of a release"
    read_folder(made_checkpoint)


def test_the_lowest_seed_is_released_and_all_are_listed(made_checkpoint, finished_runs):
    metrics = json.loads((made_checkpoint / "metrics.json").read_text())
    assert metrics["released_seed"] == 2
    assert [seed["seed"] for seed in metrics["seeds"]] == [2, 3]
    summaries = {path: json.loads((path / "summary.json").read_text()) for path in finished_runs}
    assert {s["seed"]: s["test_error"] for s in summaries.values()} == {
        s["seed"]: s["test_error"] for s in metrics["seeds"]
    }
    lowest = load_file(finished_runs[1] / "model.safetensors")
    assert all((lowest[key] == value).all() for key, value in load_file(made_checkpoint / "model.safetensors").items())


def test_the_record_of_the_beginning_is_of_the_run_s_first_network(made_checkpoint, finished_runs):
    records = json.loads((made_checkpoint / "conditioning.json").read_text())
    start, end = (from_record(records[when]) for when in ("at_init", "at_end"))
    first_step = from_record(json.loads((finished_runs[1] / "conditioning.jsonl").read_text().splitlines()[0]))
    for name in start:  # largest singular value of the weights: the same network, whatever images were seen
        assert start[name].weight == pytest.approx(first_step[name].weight, rel=1e-6)
    assert start["fc"].weight != pytest.approx(end["fc"].weight, rel=1e-3)


def test_the_table_is_made_of_the_folders(made_checkpoint):
    table = (made_checkpoint.parent / "README.md").read_text()
    assert table == checkpoints_table([made_checkpoint])
    assert "| [mlp4x24_bn.digits](mlp4x24_bn.digits/README.md) | digits |" in table


@pytest.mark.run_pictures
def test_a_run_without_a_probe_gets_a_picture_too_and_stays_as_it_was(runs, tmp_path):
    for name in ("conditioning.jsonl", "conditioning.png"):
        (runs[1] / name).unlink()
    before = sorted(path.name for path in runs[1].iterdir())
    made = release(runs, "digits", out=tmp_path)
    assert (made / "conditioning.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in runs[1].iterdir()) == before


def test_twins_stand_together_by_depth():
    names = ["cifar_resnet110.a", "cifar_resnet20_lastbn.a", "cifar_resnet20.b", "cifar_resnet20.a", "mlp8x24.a"]
    assert sorted(names, key=natural_order) == [
        "cifar_resnet20.a",
        "cifar_resnet20.b",
        "cifar_resnet20_lastbn.a",
        "cifar_resnet110.a",
        "mlp8x24.a",
    ]


def test_each_plain_network_stands_beside_its_twins_of_the_same_tag():
    names = ["cifar_resnet20.a", "cifar_resnet20.b", "cifar_resnet20_lastbn.a", "mlp8x24.m", "mlp8x24_bn.m"]
    names += ["mlp8x24_lastbn.m", "cifar_resnet56_lastbn.a"]
    rows = [Row(*name.split("."), data="d", lambda_max=f"{i}") for i, name in enumerate(names)]
    lines = [line for line in pairs_section(rows) if " -> " in line and line.startswith("| ")][1:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        "cifar_resnet20.a -> cifar_resnet20_lastbn",
        "mlp8x24.m -> mlp8x24_bn",
        "mlp8x24.m -> mlp8x24_lastbn",
    ]
    assert "| 3 -> 4 |" in lines[1]
    assert pairs_section(rows[:2]) == []


def test_cards_can_be_made_again(checkpoint):
    card, sums = (checkpoint / "README.md").read_text(), (checkpoint / SUMS).read_text()
    (checkpoint / "README.md").write_text("an older text")
    write_sums(checkpoint)
    refresh_cards(checkpoint.parent)
    assert ((checkpoint / "README.md").read_text(), (checkpoint / SUMS).read_text()) == (card, sums)
    assert "mlp4x24_bn.digits" in (checkpoint.parent / "README.md").read_text()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "summary.json",
            lambda s: s.update(epochs=1.5, steps=7),
            r"was stopped after 1.5 epochs \(7 steps\) of 2 epochs",
        ),
        ("summary.json", lambda s: s.update(status="diverged"), r"seed2 diverged; its weights are not released"),
        (
            "summary.json",
            lambda s: s.update(test_correct=s["test_correct"] - 1),
            r"evaluating it again gives \d+ of 360",
        ),
        (
            "summary.json",
            lambda s: s.update(seed=9),
            r"seed2: summary\.json has seed 9, recipe\.toml 2: they are not of one",
        ),
        ("summary.json", lambda s: s.update(model="mlp4x36"), r"summary\.json has model mlp4x36, recipe\.toml "),
        ("summary.json", lambda s: s.update(test_error=0.001), r"a test error of 0\.001; its right answers make"),
        ("environment.json", lambda e: e[0]["source"].update(changed=True), "source with uncommitted changes"),
        (
            "summary.json",
            lambda s: s.pop("test_error"),
            r"summary.json is not what a training writes: test_error: Field",
        ),
        (
            "summary.json",
            lambda s: s.update(test_correct=None),
            r"summary.json is not .*: test_correct: Input should be",
        ),
        (
            "summary.json",
            lambda s: s.update(steps=1),
            r"seed2: summary\.json has 1 steps, the last line of metrics\.jsonl \d+: they are not of one run",
        ),
        ("summary.json", lambda s: s.update(test_loss="low"), r"summary.json is not .*: test_loss: Input should be"),
        ("summary.json", lambda s: s.pop("status"), r"summary.json is not the summary of a run"),
        (
            "environment.json",
            lambda e: e.clear(),
            r"environment.json is not .*: all of it: List should have at least 1",
        ),
        ("environment.json", lambda e: e[0]["source"].pop("changed"), r"0.source.changed: Field required"),
        ("environment.json", lambda e: e[0].pop("device"), r"environment.json is not .*: 0.device: Field required"),
    ],
)
def test_a_doubtful_run_is_refused_and_nothing_is_written(runs, tmp_path, file, change, message):
    edit_json(runs[1] / file, change)
    with pytest.raises(ValueError, match=message):
        release(runs, "digits", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_weights_than_were_evaluated_are_refused(runs, tmp_path):
    state = load_file(runs[1] / "model.safetensors")
    state["fc.weight"] = state["fc.weight"].flip(0)
    save_file(state, runs[1] / "model.safetensors")
    with pytest.raises(ValueError, match="the weights, the data or the code changed"):
        release(runs, "digits", out=tmp_path)


def test_weights_of_another_function_that_classifies_alike_are_refused(runs, tmp_path):
    """Four times the logits: their largest is where it was."""
    state = load_file(runs[1] / "model.safetensors")
    save_file(
        state | {f"fc.{key}": 4 * state[f"fc.{key}"] for key in ("weight", "bias")}, runs[1] / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"recorded a test loss of [\d.]+, evaluating it again gives [\d.]+: the weights"
    ):
        release(runs, "digits", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("processor", "factor", "accepted"), [("another", 1.03, True), ("another", 1.1, False), (None, 1.03, False)]
)
def test_the_loss_on_another_cpu_may_differ_a_little(runs, processor, factor, accepted):
    if processor:
        edit_json(runs[1] / "environment.json", lambda parts: parts[-1].update(processor=processor))
    edit_json(runs[1] / "summary.json", lambda summary: summary.update(test_loss=factor * summary["test_loss"]))
    with nullcontext() if accepted else pytest.raises(ValueError, match="recorded a test loss of"):
        check_evaluation(load_run(runs[1]), None)


def test_a_run_of_before_losses_were_summed_up_is_released(runs):
    edit_json(runs[1] / "summary.json", lambda summary: summary.pop("test_loss"))
    check_evaluation(load_run(runs[1]), None)


def test_every_seed_is_evaluated_again_and_not_the_released_one_only(runs, tmp_path):
    edit_json(runs[0] / "summary.json", lambda summary: more_right(summary, 1))
    with pytest.raises(ValueError, match=r"seed3 recorded \d+ of 360 .* evaluating it again gives"):
        release(runs, "digits", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def more_right(summary, images):
    """Another number of right answers, with the test error that goes with it."""
    correct = summary["test_correct"] + images
    summary.update(test_correct=correct, test_error=1 - correct / summary["test_images"])


@pytest.mark.parametrize(("images_off", "accepted"), [(3, True), (4, False)])
def test_a_run_of_another_device_may_differ_a_little(runs, monkeypatch, images_off, accepted):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("condzoo.release.checks.OTHER_DEVICE", 0.01)  # of 360 images
    edit_json(
        runs[1] / "summary.json", lambda summary: more_right(summary, images_off) or summary.update(device="cuda")
    )
    with nullcontext() if accepted else pytest.raises(ValueError, match="evaluating it again"):
        check_evaluation(load_run(runs[1]), None)


@pytest.mark.parametrize(
    ("processor", "images_off", "accepted"), [("another", 3, True), ("another", 4, False), (None, 1, False)]
)
def test_a_run_of_another_cpu_may_differ_a_little(runs, monkeypatch, processor, images_off, accepted):
    monkeypatch.setattr("condzoo.release.checks.OTHER_DEVICE", 0.01)  # of 360 images
    if processor:
        edit_json(runs[1] / "environment.json", lambda parts: parts[-1].update(processor=processor))
    edit_json(runs[1] / "summary.json", lambda summary: more_right(summary, images_off))
    with nullcontext() if accepted else pytest.raises(ValueError, match="evaluating it again"):
        check_evaluation(load_run(runs[1]), None)


@pytest.mark.parametrize(("images_off", "accepted"), [(3, True), (4, False)])
def test_a_run_of_another_number_of_threads_may_differ_a_little(runs, monkeypatch, images_off, accepted):
    """As `condzoo eval` says of it."""
    monkeypatch.setattr("condzoo.release.checks.OTHER_DEVICE", 0.01)  # of 360 images
    edit_json(runs[1] / "environment.json", lambda parts: parts[-1].update(threads=parts[-1]["threads"] + 1))
    edit_json(runs[1] / "summary.json", lambda summary: more_right(summary, images_off))
    with nullcontext() if accepted else pytest.raises(ValueError, match="evaluating it again"):
        check_evaluation(load_run(runs[1]), None)


@pytest.mark.parametrize(("images_off", "accepted"), [(2, True), (3, False)])
def test_of_few_images_two_may_be_decided_otherwise_elsewhere(runs, images_off, accepted):
    """Of 360 the share that may is less than one."""
    edit_json(runs[1] / "environment.json", lambda parts: parts[-1].update(processor="another"))
    edit_json(runs[1] / "summary.json", lambda summary: more_right(summary, images_off))
    with nullcontext() if accepted else pytest.raises(ValueError, match="evaluating it again"):
        check_evaluation(load_run(runs[1]), None)


def test_what_a_notebook_has_set_is_not_released(finished_runs, tmp_path):
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        made = release(finished_runs, "digits", out=tmp_path)
    verification = verify_checkpoint(made)
    assert verification.ok, verification.rows


def test_a_gpu_of_another_model_is_other_arithmetic(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100")
    assert same_arithmetic({"device": "NVIDIA A100"}, "cuda")
    assert not same_arithmetic({"device": "NVIDIA H200"}, "cuda")
    assert not same_arithmetic({"device": "NVIDIA A100", "processes": 4}, "cuda")


def test_a_clone_that_git_does_not_tell_of_is_refused(runs, tmp_path):
    lost = {"commit": None, "changed": None, "error": "fatal: detected dubious ownership"}
    edit_json(runs[0] / "environment.json", lambda parts: parts[-1].update(source=lost))
    with pytest.raises(ValueError, match="whose state git did not tell \\(fatal: detected dubious ownership\\)"):
        release(runs, "digits", out=tmp_path / "out")


def test_other_folders_with_sums_are_left_alone(finished_runs, tmp_path):
    (tmp_path / "ubuntu").mkdir()
    (tmp_path / "ubuntu" / "SHA256SUMS").write_text("of something else\n")
    assert release(finished_runs, "digits", out=tmp_path).is_dir()


def test_a_damaged_checkpoint_beside_it_is_named_before_anything_is_made(finished_runs, checkpoint):
    (checkpoint / "README.md").write_text("edited")
    with pytest.raises(ValueError, match=r"README\.md is not as it was summed"):
        release(finished_runs, "other", out=checkpoint.parent)
    assert not (checkpoint.parent / "mlp4x24_bn.other").exists()


def test_other_seeds_are_another_release(runs, made_checkpoint):
    root = made_checkpoint.parent
    assert released_before(runs, "digits", out=root) == made_checkpoint
    assert released_before(runs[1], "digits", out=root) is None  # the same weights, of one seed instead of two


def test_images_of_class_folders_are_described(tmp_path):
    """By what evaluation shows of them; and only ImageNet's own are compared with what was published of it."""
    recipe = load_recipe("imagenet/resnet18_lastbn")
    data = described_data(recipe.data)
    assert (data["image_size"], data["eval_resize"], data["interpolation"]) == (224, 256, "bicubic")
    config = Config.model_validate(
        {
            "architecture": "resnet18_lastbn",
            "num_classes": 1000,
            "pretrained_cfg": dict(
                tag="a",
                input_size=(3, 224, 224),
                num_classes=1000,
                mean=(0.5,),
                std=(0.5,),
                crop_pct=0.875,
                interpolation="bicubic",
            ),
        },
        strict=False,
    )
    metrics = Metrics.model_construct(
        model="resnet18_lastbn", data=data, test_images=50_000, test_correct=35_000, seeds=[], released_seed=1, rule=""
    )
    assert preprocessing(config, metrics).startswith(
        "## Preprocessing\nScale the shorter side to 256 pixels (bicubic); centre crop to 224; scale to [0, 1]"
    )
    assert "Huang et al. 2020: 29.38" in results(metrics)
    assert "No published error" in results(metrics.model_copy(update={"test_images": 390}))


def test_an_mlp_on_images_of_another_size_is_told_the_field_to_train_it_with():
    recipe = load_recipe("digits/resnet20_nobn", ["model.name=mlp4x24"])
    with pytest.raises(ValueError, match=r"data is \(1, 16, 16\); train it with data\.resize = 12$"):
        input_fields(recipe, read_data(recipe))


def test_timm_scales_images_as_evaluation_does():
    """To floor(size / crop_pct): with the plain quotient for that, 224 of 400 were scaled to 399."""
    stored = {
        (size, whole): dict(name="imagefolder", image_size=size, eval_resize=whole)
        for size in (32, 224, 299)
        for whole in range(size, 600)
    }
    cropped = {(size, 28): dict(name="mnist", crop=size) for size in range(1, 29)}
    for (size, whole), fields in (stored | cropped).items():
        share = centre_share(DataSection.model_construct(**fields))
        assert math.floor(size / share) == whole, (size, whole)
        assert math.isclose(share, size / whole, rel_tol=1e-15)


def test_an_unfinished_run_is_refused(runs, tmp_path):
    (runs[0] / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no finished run: it has no summary\.json"):
        release(runs, "digits", out=tmp_path)
    with pytest.raises(ValueError, match="no run was given"):
        release([], "digits", out=tmp_path)


def test_a_diverged_seed_beside_a_good_one_is_listed(runs, tmp_path):
    edit_json(runs[0] / "summary.json", lambda s: s.update(status="diverged", epochs=0.5, steps=2))
    made = release(runs, "digits", out=tmp_path)
    seeds = json.loads((made / "metrics.json").read_text())["seeds"]
    assert [(seed["seed"], seed["status"], seed["test_error"] is None) for seed in seeds] == [
        (2, "done", False),
        (3, "diverged", True),
    ]
    assert "(1 diverged)" in (made / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 0.1", "lr = 0.2", "differ in more than their seed"),
        ("seed = 3", "seed = 2", r"two runs have the same seed: \[2, 2\]"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path, old, new, message):
    text = (runs[0] / "recipe.toml").read_text()
    assert old in text
    (runs[0] / "recipe.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        release(runs, "digits", out=tmp_path)


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_a_seed_that_was_trained_and_is_not_given_is_refused(runs, tmp_path, monkeypatch, status):
    """Whichever of them is the better one, and from whichever folder the command is given."""
    edit_json(runs[0] / "summary.json", lambda summary: summary.update(status=status))
    monkeypatch.chdir(runs[1])
    for path in (runs[1], "."):
        with pytest.raises(ValueError, match=r"seed3 was trained by the same recipe with seed 3, and was not given"):
            release(path, "digits", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_beside_it_that_are_no_other_seeds_do_not_matter(runs, tmp_path):
    """A seed that was stopped on its way, one of another recipe, a copy of the run, and no run at all."""
    edit_json(runs[0] / "summary.json", lambda summary: summary.update(epochs=0.5, steps=2))
    for name in ("recipe", "copy", "none"):
        shutil.copytree(runs[1], runs[1].with_name(name))
    text = (runs[1] / "recipe.toml").read_text().replace("lr = 0.1", "lr = 0.2").replace("seed = 2", "seed = 4")
    (runs[1].with_name("recipe") / "recipe.toml").write_text(text)
    (runs[1].with_name("none") / "recipe.toml").unlink()
    made = release(runs[1], "digits", out=tmp_path / "out")
    assert [seed["seed"] for seed in json.loads((made / "metrics.json").read_text())["seeds"]] == [2]


def test_a_run_given_twice_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    with pytest.raises(ValueError, match=r"a run was given twice: .*; a seed counts once"):
        release([runs[0], runs[0].name], "digits", out=tmp_path)


def test_a_model_without_a_registered_name_is_refused(runs, tmp_path):
    text = (runs[0] / "recipe.toml").read_text().replace("mlp4x24_bn", "mlp5x24_bn")
    (runs[0] / "recipe.toml").write_text(text)
    with pytest.raises(ValueError, match="mlp5x24_bn is not one of condzoo's registered models"):
        release(runs[0], "digits", out=tmp_path)


@pytest.mark.parametrize("tag", ["", "a.b", "../x", "A", "a b", "a-b"])
def test_a_tag_that_cannot_be_in_a_name_is_refused(runs, tmp_path, tag):
    with pytest.raises(ValueError, match="a tag is small letters, digits and underscores"):
        release(runs, tag, out=tmp_path)


def test_a_release_is_never_overwritten(made_checkpoint, finished_runs):
    with pytest.raises(FileExistsError, match="is already there; a release is never overwritten"):
        release(finished_runs, "digits", out=made_checkpoint.parent)


def test_someone_elses_readme_is_not_overwritten(finished_runs, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# My project\n")
    monkeypatch.setattr("condzoo.release.checks.check_evaluation", lambda *_: pytest.fail("work was done first"))
    with pytest.raises(FileExistsError, match=r"README\.md is no table of checkpoints, and would be overwritten"):
        release(finished_runs, "digits", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize("stopped_at", ["condzoo.release.making.add_to_index", "condzoo.release.making.write_table"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_release_that_was_stopped_late_is_finished_by_the_same_call(
    finished_runs, tmp_path, monkeypatch, stopped_at, error
):
    """Its folder is there; the index or the table is not up to date yet."""
    monkeypatch.setattr(released, "PACKAGE", tmp_path / "condzoo")
    monkeypatch.setattr(released, "INDEX", tmp_path / "index.toml")
    (tmp_path / "index.toml").write_text("# The index\n")
    (tmp_path / "checkpoints").mkdir()

    def stop(*_):
        raise error

    with monkeypatch.context() as full:
        full.setattr(stopped_at, stop)
        with pytest.raises(type(error)):
            release(finished_runs, "digits")
    made = release(finished_runs, "digits")
    assert made == tmp_path / "checkpoints" / "mlp4x24_bn.digits"
    index = tomllib.loads((tmp_path / "index.toml").read_text())[made.name]
    config = json.loads((made / "config.json").read_text())["pretrained_cfg"]
    assert index["sha256"] == released.sha256((made / "model.safetensors").read_bytes())
    assert index["default"]
    assert {key: index[key] for key in ("mean", "std", "input_size")} == {
        key: config[key] for key in ("mean", "std", "input_size")
    }
    assert (made.parent / "README.md").read_text() == checkpoints_table([made])
    with pytest.raises(FileExistsError, match="is already there"):
        release(finished_runs, "digits")


def test_a_failure_on_the_way_leaves_nothing(finished_runs, tmp_path, monkeypatch):
    monkeypatch.setattr("condzoo.checkpoints.writing.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        release(finished_runs, "digits", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_index_gets_a_row_and_one_default_a_model(tmp_path, monkeypatch):
    file = tmp_path / "released.toml"
    shutil.copy(released.INDEX, file)
    monkeypatch.setattr(released, "INDEX", file)
    monkeypatch.setattr("condzoo.catalog.RELEASED", file)
    before = released.read_index()
    cfg = {"mean": [0.5], "std": [0.25], "crop_pct": 1.0, "interpolation": "bilinear", "num_classes": 10}
    cfg |= {"input_size": [1, 12, 12], "tag": "a"}
    for tag, default in (("first", False), ("second", False), ("third", True)):
        add_to_index(f"mlp100x256.{tag}", "0" * 64, cfg, default)
    index = released.read_index()
    assert {name: index[name] for name in before} == before
    ours = released.releases_of("mlp100x256")
    assert [(r.tag, r.default) for r in ours] == [("third", True), ("first", False), ("second", False)]
    assert ours[0].input["mean"] == (0.5,)
    assert "tag" not in ours[0].input
    add_to_index("mlp100x256.third", "0" * 64, cfg, False)  # made again
    assert [(r.tag, r.default) for r in released.releases_of("mlp100x256")] == [(r.tag, r.default) for r in ours]
    only = next(name for name, release in before.items() if len(released.releases_of(release.arch)) == 1)
    add_to_index(only, "0" * 64, cfg, False)  # made again: still the one its model's name stands for
    assert released.read_index()[only].default
    assert list_models("mlp100x256", pretrained=True) == ["mlp100x256.first", "mlp100x256.second", "mlp100x256.third"]
    assert file.read_text().startswith("# The package's own index")
    tomllib.loads(file.read_text())


@pytest.mark.parametrize("name", ["cifar10/resnet20_lastbn", "cifar10/resnet32_lastbn"])  # a file, its variant
def test_a_recipe_of_the_repository_is_recognized_with_its_header(name):
    recipe = load_recipe(name).model_copy(update={"seed": 77})
    found, header = repository_recipe(recipe)
    assert found == name
    assert header["Source"].startswith("the authors' defaults")
    assert repository_recipe(recipe.model_copy(update={"epochs": 3})) == (None, {})


def test_header_fields_join_their_lines():
    text = "# Title\n#\n# Source:   one\n#           two\n# Departs:  three.\nepochs = 1\n# Source: not this\n"
    assert header_fields(text) == {"Source": "one two", "Departs": "three."}
