"""Training on class folders: the same promises as in memory, to the last image and the last bit."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from condzoo.probe import read_records
from condzoo.training import (
    EpochDone,
    RecipeError,
    Run,
    RunDirectoryError,
    Stopped,
    evaluate_run,
    train,
)
from condzoo.training.rehearsal import rehearse
from condzoo.training.resume import newest_checkpoint, save_checkpoint
from tests.forked import LIMIT, forked, wait_until
from tests.training.timeless import timeless

STORED: dict[str, Any] = {
    "model.name": "cifar_resnet8_lastbn",
    "data.name": "imagefolder",
    "data.batch_size": 4,
    "data.augment": "paper",
    "data.image_size": 16,
    "data.workers": 0,
    "probe.every": 3,
    "ema": 0.9,
    "save_every": 0.3,
}
RECORDS = ("metrics.jsonl", "conditioning.jsonl")


def records(run: Path) -> list[dict[str, Any]]:
    return [line for name in RECORDS for line in timeless(run / name)]


def equal(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(run / "model.safetensors") for run in (a, b))
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return same and records(a) == records(b)


def trained(recipe: Any, out: Path, root: Path, **options: Any) -> Run:
    return train(recipe, out=out, device="cpu", data_root=root, **options)


def test_a_run_is_probed_and_evaluated_again_to_the_last_image(tiny: Any, tmp_path: Path, folders: Any) -> None:
    root = folders()
    run = trained(tiny(**STORED), tmp_path / "run", root)
    assert (run.summary["steps"], run.summary["test_images"], run.summary["num_classes"]) == (6, 6, 3)
    assert [list(record)[-1] for record in read_records(run.path)] == ["fc", "fc"]
    again = evaluate_run(run.path, data_root=root, device="cpu")
    assert (again.correct, again.total, again.loss) == (
        run.summary["test_correct"],
        run.summary["test_images"],
        run.summary["test_loss"],
    )
    assert run.load_model()(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    shutil.rmtree(root / "train")
    assert trained(tiny(**STORED), tmp_path / "run", root) == run, "nothing is left to train, and no data needed"
    assert evaluate_run(run.path, data_root=root, device="cpu") == again
    with pytest.raises(FileNotFoundError, match=r"/train is missing: an imagefolder's root holds train/ and val/"):
        evaluate_run(run.path, data_root=root, device="cpu", split="train")


def test_workers_change_nothing(tiny: Any, tmp_path: Path, folders: Any) -> None:
    root, recipe = folders(), tiny(**STORED)
    trained(recipe, tmp_path / "none", root)
    trained(recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 2})}), tmp_path / "two", root)
    assert equal(tmp_path / "none", tmp_path / "two")


def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch(tiny: Any, tmp_path: Path, folders: Any) -> None:
    root, recipe = folders(), tiny(**STORED)
    trained(recipe, tmp_path / "whole", root)

    def stop(event: Any) -> None:
        if getattr(event, "step", None) == 4 and not isinstance(event, EpochDone):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGTERM at step 5"):
        trained(recipe, tmp_path / "stopped", root, on_event=stop)
    trained(recipe, tmp_path / "stopped", root)
    assert equal(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_run_ends_where_an_undisturbed_one_does(tiny: Any, tmp_path: Path, folders: Any) -> None:
    root = folders()
    recipe = tiny(**{**STORED, "data.workers": 1, "epochs": 4})
    trained(recipe, tmp_path / "whole", root)
    killed = tmp_path / "killed"
    with forked(lambda: trained(recipe, killed, root, on_event=lambda event: time.sleep(0.1))) as process:
        wait_until(lambda: list(killed.glob("checkpoints/*5.json")), process)
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "summary.json").exists()
    trained(recipe, killed, root)
    assert equal(tmp_path / "whole", killed)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not say who sent a signal")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_signal_to_the_whole_group_leaves_the_workers_until_the_run_is_saved(
    tiny: Any, tmp_path: Path, folders: Any
) -> None:
    small = {"model.name": "mlp4x24", "eval_every": 0}
    root, recipe = folders(), tiny(**{**STORED, **small, "data.workers": 2, "epochs": 40})
    stopped = tmp_path / "stopped"

    def training() -> None:
        os.setsid()
        try:
            trained(recipe, stopped, root, max_steps=60, on_event=lambda event: time.sleep(0.02))
        except Stopped as error:
            sys.exit(error.exit_code)

    with forked(training) as process:
        # the second epoch: workers are being started or at work
        wait_until(lambda: list(stopped.glob("checkpoints/*4.json")), process)
        os.killpg(process.pid, signal.SIGTERM)
        process.join(LIMIT)
    assert process.exitcode == 75
    events: list[Any] = []
    saved = int(max(stopped.glob("checkpoints/*.json")).stem.removeprefix("step_"))
    assert trained(recipe, stopped, root, max_steps=saved + 1, on_event=events.append).summary["steps"] == saved + 1
    assert events[0].start_step == saved


def test_a_damaged_image_ends_the_run_with_its_path(tiny: Any, tmp_path: Path, folders: Any) -> None:
    root = folders()
    victim = root / "train/cat/3.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{victim} cannot be read") as caught:
        trained(tiny(**STORED), tmp_path / "run", root)
    assert "\n" not in str(caught.value)


def test_other_images_under_the_same_recipe_are_refused(tiny: Any, tmp_path: Path, folders: Any) -> None:
    root, recipe = folders(), tiny(**{**STORED, "model.name": "mlp4x24", "probe.every": 0})
    run = trained(recipe, tmp_path / "run", root, max_steps=2)
    (root / "train/ant/0.png").unlink()
    message = r"run was trained on 12 training images of 3 classes, and the data here have 11 training images of 3 cl"
    with pytest.raises(RunDirectoryError, match=message):
        trained(recipe, tmp_path / "run", root, max_steps=3)
    for split in ("train", "val"):
        shutil.copytree(root / split / "bee", root / split / "dog")
    with pytest.raises(ValueError, match=r"run was trained on 3 classes, and the data here have 4; name its own data"):
        evaluate_run(run.path, data_root=root, device="cpu")
    with pytest.raises(
        RunDirectoryError, match=r"12 training images of 3 classes, and the data here have 15 training im"
    ):
        trained(recipe, tmp_path / "run", root, max_steps=3)


def test_classes_of_other_names_under_the_same_recipe_are_refused(tiny: Any, tmp_path: Path, folders: Any) -> None:
    """Names say which output is whose: another one may move a class behind others."""
    root, recipe = folders(), tiny(**{**STORED, "model.name": "mlp4x24", "probe.every": 0})
    run = trained(recipe, tmp_path / "run", root, max_steps=2)
    assert run.summary["class_names"] == ["ant", "bee", "cat"]
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "wasp")
    message = r"run was trained on classes of other names: class 0 was 'ant' and is 'bee' here, and names say which"
    with pytest.raises(RunDirectoryError, match=message):
        trained(recipe, run.path, root, max_steps=3)
    with pytest.raises(ValueError, match=message):
        evaluate_run(run.path, data_root=root, device="cpu")


def test_a_checkpoint_that_does_not_say_its_images_is_gone_on_from(tiny: Any, tmp_path: Path, folders: Any) -> None:
    root, recipe = folders(), tiny(**{**STORED, "model.name": "mlp4x24", "probe.every": 0})
    run = trained(recipe, tmp_path / "run", root, max_steps=2)
    old = newest_checkpoint(run.path / "checkpoints", notify=lambda text: None)
    assert old is not None
    said = [old.numbers.pop(name) for name in ("classes", "training_images", "class_names")]
    assert said == [3, 12, ["ant", "bee", "cat"]]
    save_checkpoint(run.path / "checkpoints", old)
    assert trained(recipe, run.path, root, max_steps=3).summary["steps"] == 3


def test_a_rehearsal_decodes_every_image(tiny: Any, folders: Any) -> None:
    root, recipe = folders(), tiny(**{**STORED, "model.name": "mlp4x24"})
    told: list[Any] = []
    assert rehearse(recipe, device="cpu", data_root=root, on_event=told.append).training_images == 12
    assert [event.text for event in told] == [f"decoding every image of {root}; the step comes after"]
    victims = [root / "train/cat/3.jpg", root / "val/ant/1.jpg"]
    for victim in victims:
        victim.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{victims[0]} is no image; .*\n{victims[1]} is no image; "):
        rehearse(recipe, device="cpu", data_root=root)


def test_a_rehearsal_decodes_every_image_of_a_hugging_face_set(tiny: Any, tmp_path: Path, folders: Any) -> None:
    datasets, root = pytest.importorskip("datasets"), folders()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    victim = root / "val/cat/1.jpg"
    victim.write_bytes(b"no image")
    for split in ("train", "val"):
        images = sorted(str(path) for path in (root / split).glob("*/*"))
        labels = [Path(path).parent.name for path in images]
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    own = {"data.name": "hfds", "data.dataset": str(tmp_path / "set"), "model.name": "mlp4x24"}
    told: list[Any] = []
    with pytest.raises(ValueError, match=rf"^{victim} \(validation\[5\] of set\) is no image; replace"):
        rehearse(tiny(**{**STORED, **own}), device="cpu", data_root=tmp_path / "cache", on_event=told.append)
    assert [event.text for event in told] == [f"decoding every image of {tmp_path / 'set'}; the step comes after"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.crop": 8}, r"data\.crop: is not for data\.name = 'imagefolder', which has: image_size, eval_resize, "),
        ({"data.download": True}, r"data\.download: is not for data\.name = 'imagefolder'"),
        ({"data.eval_resize": 12}, r"data\.eval_resize: got 12, must be at least data\.image_size \(16\)"),
        ({"data.workers": -1}, r"data\.workers: got -1, must be greater than or equal to 0"),
        ({"data.interpolation": "cubic"}, r"data\.interpolation: got 'cubic', must be one of: bilinear, bicubic; did"),
        (
            {"data.name": "digits", "data.image_size": None},
            r"data\.workers: is not for data\.name = 'digits', which has: crop, resize",
        ),
        ({"data.name": "digits"}, r"data\.image_size: is not for data\.name = 'digits', which has: crop, resize"),
    ],
)
def test_fields_of_the_other_kind_are_refused(changes: dict[str, Any], message: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny(**{**STORED, **changes})
