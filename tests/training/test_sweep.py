"""Many runs of one recipe: planned, skipped where finished, and not stopped by one that fails."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from condzoo.training import Notice, RecipeError, Started, StepDone, Stopped, parse_grid, parse_seeds, sweep
from condzoo.training.sweep import plan_sweep


def test_every_combination_is_a_run_of_its_own(tiny: Any, tmp_path: Path) -> None:
    grid = {"optim.lr": [0.1, 0.01], "model.name": ["mlp4x24", "mlp4x24_bn"]}
    runs = sweep(tiny(), grid, [1, 2], tmp_path, max_steps=2, device="cpu")
    assert [r.path.name for r in runs[:3]] == [
        "optim.lr=0.1-model.name=mlp4x24-seed1",
        "optim.lr=0.1-model.name=mlp4x24-seed2",
        "optim.lr=0.1-model.name=mlp4x24_bn-seed1",
    ]
    assert len(runs) == 8
    assert runs[-1].recipe == tiny(**{"optim.lr": 0.01, "model.name": "mlp4x24_bn", "seed": 2})
    assert len({run.summary["test_loss"] for run in runs}) == 8


def test_a_second_call_trains_only_what_is_missing(tiny: Any, tmp_path: Path) -> None:
    first = sweep(tiny(), {"optim.lr": [0.1]}, [1], tmp_path, device="cpu")
    events: list[Any] = []
    both = sweep(tiny(), {"optim.lr": [0.1, 0.2]}, [1], tmp_path, device="cpu", on_event=events.append)
    assert both[0] == first[0]
    assert [e.recipe.optim.lr for e in events if isinstance(e, Started)] == [0.2]


def test_a_diverged_or_failed_run_is_recorded_and_the_others_go_on(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"optim.momentum": 0.0, "optim.nesterov": False})
    blocked = tmp_path / "optim.lr=0.2-seed1"
    blocked.mkdir()
    (blocked / "thesis.tex").write_text("x")
    events: list[Any] = []
    runs = sweep(recipe, {"optim.lr": [1e30, 0.2, 0.1]}, None, tmp_path, device="cpu", on_event=events.append)
    assert [run.summary["status"] for run in runs] == ["diverged", "failed", "done"]
    assert "is not a run directory" in runs[1].summary["error"]
    assert any(isinstance(e, Notice) and "failed" in e.text for e in events)
    assert runs[2].test_error is not None


def test_a_signal_stops_the_whole_sweep(tiny: Any, tmp_path: Path) -> None:
    def interrupt(event: Any) -> None:
        if isinstance(event, StepDone):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        sweep(tiny(), {}, [1, 2], tmp_path, device="cpu", on_event=interrupt)
    assert not (tmp_path / "seed2").exists()


def test_an_invalid_combination_is_refused_before_anything_is_trained(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"optim.lr=-1-seed1: optim.lr: got -1, must be greater than 0"):
        sweep(tiny(), {"optim.lr": [0.1, -1]}, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_names_are_safe(tiny: Any) -> None:
    (name,) = plan_sweep(tiny(), {"freeze": [["layers.0.*"]]}, [3])
    assert "/" not in name
    assert "*" not in name


def test_grids_and_seeds_as_text() -> None:
    assert parse_grid(["optim.lr=0.1,1e-2", "model.name=a,b", "data.crop=6,none"]) == {
        "optim.lr": [0.1, 0.01],
        "model.name": ["a", "b"],
        "data.crop": [6, None],
    }
    assert parse_seeds("1-3") == [1, 2, 3]
    assert parse_seeds("1,3, 7-8") == [1, 3, 7, 8]
    for wrong in ("optim.lr", "=1", "optim.lr="):
        with pytest.raises(RecipeError, match=r"must be FIELD=A,B,\.\.\., e\.g\. optim\.lr=0\.1,0\.01"):
            parse_grid([wrong])
    for wrong in ("", "a", "3-1", "1-", "-1"):
        with pytest.raises(RecipeError, match="must be like 1-5 or 1,3,7"):
            parse_seeds(wrong)
