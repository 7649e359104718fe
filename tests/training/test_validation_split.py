"""Validation while a run goes on, the test images at its end."""

import json
from pathlib import Path
from typing import Any

import pytest

from condzoo.training import RecipeError, evaluate_run, train


def epochs(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] != "step"]


def test_validation_is_measured_each_epoch_and_the_test_once(tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(**{"data.validation": 0.1, "epochs": 3}), out=tmp_path / "run", device="cpu")
    lines = epochs(run.path)
    assert ["val_error" in line for line in lines] == [True, True, True]
    assert ["test_error" in line for line in lines] == [False, False, True]
    assert [line["val_images"] for line in lines] == [144] * 3
    assert (run.summary["steps"], run.summary["test_images"], run.summary["val_images"]) == (3 * 10, 360, 144)
    for split, prefix in (("validation", "val"), ("test", "test")):
        again = evaluate_run(run.path, device="cpu", split=split)
        assert (again.correct, again.loss) == (run.summary[f"{prefix}_correct"], run.summary[f"{prefix}_loss"])


def test_a_run_cut_short_is_tested_and_goes_on(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"data.validation": 100, "epochs": 2})
    short = train(recipe, out=tmp_path / "run", max_steps=3, device="cpu")
    assert (short.summary["val_images"], short.summary["test_images"]) == (100, 360)
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    assert train(recipe, out=tmp_path / "run", device="cpu").summary["test_correct"] == whole.summary["test_correct"]
    assert [line["val_correct"] for line in epochs(tmp_path / "run")] == [
        line["val_correct"] for line in epochs(whole.path)
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r"data\.validation: got 0, must be greater than 0"),
        (10.5, r"data\.validation: got 10\.5, must be a share under 1 or a whole number of images"),
        ("0.1", r"data\.validation: got '0\.1', must be a number"),
    ],
)
def test_a_wrong_share_is_told(value: Any, message: str, tiny: Any) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny(**{"data.validation": value})


def test_more_than_there_is_is_told_before_training(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.validation: 2000 holds out 2000 of 1437 training images"):
        train(tiny(**{"data.validation": 2000}), out=tmp_path / "run", device="cpu")


def test_a_run_cut_short_right_after_an_epoch_keeps_that_epochs_training_loss(tiny: Any, tmp_path: Path) -> None:
    """The epoch's line has no test images; the line of the end, which has them, is of no training image."""
    run = train(tiny(**{"data.validation": 0.1}), out=tmp_path / "run", max_steps=10, device="cpu")
    epoch, end = epochs(run.path)
    assert "train_loss" not in end
    assert run.summary["train_loss"] == epoch["train_loss"] > 0
    assert (run.summary["test_images"], end["val_error"]) == (360, epoch["val_error"])
