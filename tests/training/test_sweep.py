"""Many runs of one recipe: planned, skipped where finished, and not stopped by one that fails."""

import json
import os
import re
import shutil
import signal
import statistics
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from condzoo.training import (
    Finished,
    Message,
    Notice,
    RecipeError,
    RunDirectoryError,
    Started,
    StepDone,
    Stopped,
    attempts,
    finished_among,
    parse_grid,
    parse_seeds,
    plan_sweep,
    run_all,
    state_of,
    summaries,
    sweep,
    take_shard,
    train,
    train_seeds,
)
from condzoo.training.attempts import RunOptions, attempt
from condzoo.training.recipe import parse_recipe
from condzoo.training.summaries import write_summary


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


def test_a_folders_name_is_no_longer_than_file_systems_allow(tiny: Any) -> None:
    said = r"by its values, and freeze=\S{53}\.\.\. has 334 bytes, more than the 255 that a name may have"
    with pytest.raises(RecipeError, match=said):
        plan_sweep(tiny(), {"freeze": [["fc.*"] * 80]})


def test_seeds_and_grids_may_be_numpys(tiny: Any, tmp_path: Path) -> None:
    plain = plan_sweep(tiny(), {"optim.lr": [0.01, 0.1], "data.batch_size": [64]}, [0, 1])
    grid: Any = {"optim.lr": np.array([0.01, 0.1]), "data.batch_size": np.array([64])}
    seeds: Any = np.arange(2)
    assert plan_sweep(tiny(), grid, seeds) == plain
    assert plan_sweep(tiny(), {**grid, "seed": seeds}) == plain
    runs = train_seeds(tiny(), seeds, tmp_path, max_steps=1, device="cpu")
    assert [run.summary["seed"] for run in runs] == [0, 1]
    one: Any = np.int64(1)
    assert train(tiny(), out=tmp_path / "seed1", seed=one, max_steps=1, device="cpu").summary == runs[1].summary
    for wrong in (True, 1.5, np.array([1, 2]), "1"):
        with pytest.raises(RecipeError, match=r"seed: got .*, must be a whole number"):
            train(tiny(), out=tmp_path / "seed1", seed=wrong, max_steps=1, device="cpu")  # type: ignore[arg-type]


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


def test_a_run_that_another_call_had_in_use_and_has_finished_since_is_done(tiny: Any, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "seed2", tiny(epochs=1, seed=2)
    folder.mkdir()
    lock = FileLock(folder / ".lock")
    lock.acquire()

    def finish(event: Any) -> None:
        """As the other call, once this one has gone on to seed 3."""
        if isinstance(event, Message) and event.text == "[3/3] seed3":
            lock.release()
            train(recipe, out=folder, device="cpu")

    events: list[Any] = []
    runs = sweep(recipe, {}, [1, 2, 3], tmp_path, device="cpu", on_event=lambda e: (events.append(e), finish(e)))
    assert any(isinstance(e, Notice) and "seed2 is in use by another run" in e.text for e in events)
    assert [run.summary["status"] for run in runs] == ["done"] * 3
    written = json.loads((tmp_path / "summary.json").read_text())
    assert [run["status"] for run in written["runs"].values()] == ["done"] * 3


def test_calls_that_end_at_once_keep_each_others_runs(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comes to its end while the other has read the summary and not yet written its own."""
    one, two = (train(tiny(seed=n), out=tmp_path / f"seed{n}", max_steps=1, device="cpu") for n in (1, 2))
    inner, other = summaries.earlier, Thread(target=lambda: write_summary(tmp_path, {"seed2": two}))

    def slow(summary: Path) -> Any:
        found = inner(summary)
        if current_thread() is not other:
            other.start()
            other.join(0.3)
        return found

    monkeypatch.setattr(summaries, "earlier", slow)
    write_summary(tmp_path, {"seed1": one})
    other.join()
    assert list(json.loads((tmp_path / "summary.json").read_text())["runs"]) == ["seed1", "seed2"]


def test_what_one_of_several_processes_meets_alone_ends_the_sweep(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it in the run that failed, not in the next one."""
    error = RuntimeError("out of memory")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(attempts, "train", fail)
    assert attempt(tiny(), tmp_path, RunOptions()).summary["status"] == "failed"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        attempt(tiny(), tmp_path, RunOptions())
    error.shared = True  # type: ignore[attr-defined]
    assert attempt(tiny(), tmp_path, RunOptions()).summary["status"] == "failed"


def test_a_signal_stops_the_whole_sweep(tiny: Any, tmp_path: Path) -> None:
    def interrupt(event: Any) -> None:
        if isinstance(event, StepDone):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        sweep(tiny(), {}, [1, 2], tmp_path, device="cpu", on_event=interrupt)
    assert not (tmp_path / "seed2").exists()


def test_a_signal_between_two_runs_stops_there(tiny: Any, tmp_path: Path) -> None:
    def interrupt(event: Any) -> None:  # after the last step: the run itself has nothing left to stop
        if isinstance(event, Finished):
            os.kill(os.getpid(), signal.SIGINT)

    planned = {"a": tiny(epochs=1), "b": tiny(epochs=1, seed=2)}
    with pytest.raises(Stopped, match=r"stopped by SIGINT between two runs; run the same command to go on"):
        run_all(planned, tmp_path, device="cpu", on_event=interrupt)
    assert not (tmp_path / "b").exists()


def test_the_summary_has_mean_and_sample_deviation_of_the_seeds_that_are_done(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny(**{"optim.momentum": 0.0, "optim.nesterov": False})
    runs = sweep(recipe, {"optim.lr": [0.1, 1e30]}, [1, 2, 3], tmp_path, max_steps=3, device="cpu")
    written = json.loads((tmp_path / "summary.json").read_text())
    good, wild = written["settings"]["optim.lr=0.1"], written["settings"]["optim.lr=1e+30"]
    errors = [run.summary["test_error"] for run in runs[:3]]
    assert good["test_error"] == {"mean": statistics.fmean(errors), "std": statistics.stdev(errors), "n": 3}
    assert (good["done"], good["diverged"], good["seeds"]) == (3, 0, [1, 2, 3])
    assert (wild["done"], wild["diverged"]) == (0, 3)
    assert "test_error" not in wild, "a diverged run has no place in a mean"
    assert list(written["runs"]) == [run.path.name for run in runs]
    assert written["runs"]["optim.lr=1e+30-seed2"]["diverged"]["step"] == 1


def test_runs_that_were_cut_short_are_in_no_mean(tiny: Any, tmp_path: Path) -> None:
    train_seeds(tiny(), [1, 2], tmp_path, max_steps=3, device="cpu")
    (whole,) = train_seeds(tiny(), [3], tmp_path, device="cpu")
    found = json.loads((tmp_path / "summary.json").read_text())["settings"][""]
    assert (found["seeds"], found["done"], found["shorter"]) == ([1, 2, 3], 3, 2)
    assert found["test_error"] == {"mean": whole.test_error, "std": None, "n": 1}
    train_seeds(tiny(), [1, 2], tmp_path, device="cpu")
    found = json.loads((tmp_path / "summary.json").read_text())["settings"][""]
    assert (found["shorter"], found["test_error"]["n"]) == (0, 3)


def test_seeds_of_one_recipe_train_once_each(tiny: Any, tmp_path: Path) -> None:
    first = train_seeds(tiny(), [1, 2], tmp_path, max_steps=3, device="cpu")
    events: list[Any] = []
    both = train_seeds(tiny(), [1, 2, 5], tmp_path, max_steps=3, device="cpu", on_event=events.append)
    assert [run.path.name for run in both] == ["seed1", "seed2", "seed5"]
    assert [run.recipe.seed for run in both] == [1, 2, 5]
    assert both[:2] == first
    assert [e.recipe.seed for e in events if isinstance(e, Started)] == [5]
    assert json.loads((tmp_path / "summary.json").read_text())["settings"][""]["test_error"]["n"] == 3


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_many_runs_do_not_go_into_the_directory_of_one(engine: str, tiny: Any, tmp_path: Path) -> None:
    run = train(tiny(), out=tmp_path, max_steps=1, device="cpu")
    with pytest.raises(RunDirectoryError, match="is the directory of one run; several need a folder of their own"):
        sweep(tiny(), {}, [1, 2], tmp_path, engine=engine)
    assert json.loads((tmp_path / "summary.json").read_text()) == run.summary


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("out", ["file", "file/within"])
def test_many_runs_do_not_go_into_a_file(engine: str, out: str, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"file is a file; --out must be a folder, or not there yet"):
        sweep(tiny(), {}, [1, 2], tmp_path / out, engine=engine)


def test_the_summary_of_others_is_not_replaced(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"year": 1905}')
    for many in (lambda: sweep(tiny(), {}, [1], tmp_path), lambda: train_seeds(tiny(), [1], tmp_path)):
        with pytest.raises(
            RunDirectoryError, match=r"summary\.json is not of several runs, whose summary would replace"
        ):
            many()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "summary.json").unlink()
    train_seeds(tiny(), [1], tmp_path, max_steps=1, device="cpu")
    written = (tmp_path / "summary.json").read_text()
    for many in (train_seeds, lambda recipe, seeds, out: sweep(recipe, {}, seeds, out)):
        with pytest.raises(
            RunDirectoryError, match=r"seed1 belongs to another recipe: optim\.lr is 0\.1 there and 0\.2"
        ):
            many(tiny(**{"optim.lr": 0.2}), [2], tmp_path)
    assert (tmp_path / "summary.json").read_text() == written
    assert not (tmp_path / "seed2").exists()
    sweep(tiny(), {"optim.lr": [0.2]}, [2], tmp_path, max_steps=1, device="cpu")  # another setting beside it


def test_the_summary_keeps_the_runs_of_earlier_calls(tiny: Any, tmp_path: Path) -> None:
    def recorded(file: str = "summary.json") -> dict[str, Any]:
        settings = json.loads((tmp_path / file).read_text())["settings"]
        return {name: (group["seeds"], group["test_error"]["n"]) for name, group in settings.items()}

    options = {"max_steps": 1, "device": "cpu"}
    train_seeds(tiny(), [1, 2, 3], tmp_path, **options)
    train_seeds(tiny(), [4, 5], tmp_path, **options)
    assert recorded() == {"": ([1, 2, 3, 4, 5], 5)}
    train_seeds(tiny(), [1], tmp_path, **options)
    shutil.rmtree(tmp_path / "seed3")
    sweep(tiny(), {"optim.name": ["gd"]}, [1], tmp_path, **options)
    sweep(tiny(), {"optim.lr": [1e-05]}, [1, 2], tmp_path, **options)
    others = {"optim.name=gd": ([1], 1), "optim.lr=1e-05": ([1, 2], 2)}
    assert recorded() == {"": ([1, 2, 4, 5], 4), **others}, "seed3 lies there no more"
    for seed in (1, 2):
        sweep(tiny(), {"ema": [0.5]}, [seed], tmp_path, shard="1/2", **options)
    assert recorded("summary-1of2.json") == {"ema=0.5": ([1, 2], 2)}
    assert recorded() == {"": ([1, 2, 4, 5], 4), **others}


def test_the_summary_says_what_has_become_of_earlier_runs_since(tiny: Any, tmp_path: Path) -> None:
    """Trained on by themselves, one of them after it failed; one that failed again after it was cut short stays so."""
    recipe, options = tiny(iterations=3), {"max_steps": 1, "device": "cpu"}
    for seed in (2, 3):
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}/thesis.tex").touch()
    sweep(recipe, {}, [1, 2, 3, 4], tmp_path, **options)
    for seed, steps in ((1, None), (2, None), (3, 2)):
        (tmp_path / f"seed{seed}/thesis.tex").unlink(missing_ok=True)
        train(recipe, seed=seed, out=tmp_path / f"seed{seed}", max_steps=steps, device="cpu")
    sweep(recipe, {}, [5], tmp_path, device="cpu")
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {name: (run["status"], run.get("steps")) for name, run in summary["runs"].items()}
    done, failed, cut = ("done", 3), ("failed", None), ("done", 1)
    assert states == {"seed1": done, "seed2": done, "seed3": failed, "seed4": cut, "seed5": done}
    assert (summary["settings"][""]["shorter"], summary["settings"][""]["test_error"]["n"]) == (1, 3)


def test_a_sweep_of_another_recipe_does_not_join_a_summary(tiny: Any, tmp_path: Path) -> None:
    sweep(tiny(), {"optim.lr": [0.1]}, [1], tmp_path, max_steps=1, device="cpu")
    written = (tmp_path / "summary.json").read_text()
    adam = tiny(optim={"name": "adam", "lr": 0.1, "eps": 1e-6})
    for other, grid, message in (
        (tiny(epochs=3), {"optim.lr": [0.2]}, r"another recipe: epochs is 2 there and 3 here; use another --out"),
        (adam, {"optim.lr": [0.2]}, r"another recipe: optim\.name is 'sgd' there and 'adam' here; use another --out"),
        (adam, {"optim.name": ["adamw"]}, r"another recipe; use another --out"),
    ):
        with pytest.raises(
            RunDirectoryError, match=rf"summary\.json is of other runs, too: .*-seed1 belongs to {message}"
        ):
            sweep(other, grid, [1], tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("[!.]*"))] == ["optim.lr=0.1-seed1", "summary.json"]
    assert (tmp_path / "summary.json").read_text() == written


def test_what_fails_for_every_seed_is_an_error(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cifar10"):
        train_seeds(tiny(**{"data.name": "cifar10"}), [1, 2], tmp_path, data_root=tmp_path / "nowhere")


def test_a_run_counts_as_finished_only_as_far_as_it_is_asked_to_go(tiny: Any, tmp_path: Path) -> None:
    run_all({"run": tiny()}, tmp_path, max_steps=3, device="cpu")
    finished = {steps: bool(finished_among({"run": tiny()}, tmp_path, steps)) for steps in (2, 3, 4, None)}
    assert finished == {2: True, 3: True, 4: False, None: False}
    assert not finished_among({"run": tiny(seed=2)}, tmp_path, 3), "of another recipe"
    run_all({"run": tiny()}, tmp_path, device="cpu")
    assert finished_among({"run": tiny()}, tmp_path)
    (tmp_path / "run" / "model.safetensors").unlink()
    assert not finished_among({"run": tiny()}, tmp_path), "its weights are to be written again"


def test_the_results_of_a_sweep_that_was_copied_without_large_files_stand(tiny: Any, tmp_path: Path) -> None:
    runs = sweep(tiny(), {}, [1, 2], tmp_path / "there", max_steps=3, device="cpu")
    large = shutil.ignore_patterns("*.safetensors", "checkpoints")
    shutil.copytree(tmp_path / "there", tmp_path / "here", ignore=large)
    before = {path: path.read_bytes() for path in (tmp_path / "here").rglob("*.json*")}
    again = sweep(tiny(), {}, [1, 2], tmp_path / "here", max_steps=3, device="cpu")
    assert [run.summary for run in again] == [run.summary for run in runs]
    assert {path: path.read_bytes() for path in before} == before
    longer = sweep(tiny(), {}, [1], tmp_path / "here", max_steps=4, device="cpu")
    assert "holds no checkpoint to go on from" in longer[0].summary["error"]


def test_the_state_of_a_run_is_known_before_it_is_trained(tiny: Any, tmp_path: Path) -> None:
    assert state_of(tiny(), tmp_path / "new") == "to do"
    (tmp_path / "empty").mkdir()
    assert state_of(tiny(), tmp_path / "empty") == "to do"
    train(tiny(), out=tmp_path / "run", max_steps=1, device="cpu")
    assert [state_of(tiny(), tmp_path / "run", steps) for steps in (1, None)] == ["done", "begun"]
    other = state_of(tiny(**{"optim.lr": 0.5}), tmp_path / "run")
    assert re.fullmatch(r"blocked: .* belongs to another recipe: optim.lr is 0.1 there and 0.5 here; use .*", other)
    (tmp_path / "empty" / "thesis.tex").write_text("x")
    assert state_of(tiny(), tmp_path / "empty").startswith("blocked: ")
    (tmp_path / "run" / "recipe.toml").write_text("epochs = ")
    assert state_of(tiny(), tmp_path / "run").startswith("blocked: ")


def test_shards_have_every_run_once(tiny: Any) -> None:
    planned = plan_sweep(tiny(), {"optim.lr": [0.1, 0.2]}, [1, 2, 3, 4, 5])
    shards = [take_shard(planned, f"{i}/3") for i in (1, 2, 3)]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    assert sorted(name for shard in shards for name in shard) == sorted(planned)
    assert take_shard(planned, None) == planned
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(RecipeError, match=rf"shard '{wrong}': must be I/N with I from 1 to N, e.g. 2/4"):
            take_shard(planned, wrong)


def test_a_shard_has_a_summary_of_its_own(tiny: Any, tmp_path: Path) -> None:
    sweep(tiny(), {}, [1, 2, 3], tmp_path, shard="2/2", max_steps=1, device="cpu")
    assert list(json.loads((tmp_path / "summary-2of2.json").read_text())["runs"]) == ["seed2"]
    assert not (tmp_path / "seed1").exists()


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
    lists = "freeze=[],['conv1.*', 'fc,x'],[\"a\"]", "optim.betas=[0.9,0.99],[0.8, 0.9]", "model.args={a=1,b=2},{}"
    assert parse_grid(lists) == {
        "freeze": [[], ["conv1.*", "fc,x"], ["a"]],
        "optim.betas": [[0.9, 0.99], [0.8, 0.9]],
        "model.args": [{"a": 1, "b": 2}, {}],
    }
    assert parse_seeds("1-3") == [1, 2, 3]
    assert parse_seeds("1,3, 7-8") == [1, 3, 7, 8]
    assert parse_seeds("1-3,2,5,1") == [1, 2, 3, 5], "a seed is one run, however often it is named"
    for wrong in ("optim.lr", "=1", "optim.lr="):
        with pytest.raises(RecipeError, match=r"must be FIELD=A,B,\.\.\., e\.g\. optim\.lr=0\.1,0\.01"):
            parse_grid([wrong])
    for wrong in ("", "a", "3-1", "1-", "-1"):
        with pytest.raises(RecipeError, match="must be like 1-5 or 1,3,7"):
            parse_seeds(wrong)
    with pytest.raises(RecipeError, match=r"^seeds '1,2-90000000000': 2-90000000000 are 89999999999, must be at most"):
        parse_seeds("1,2-90000000000")


def test_seeds_of_a_grid_are_the_runs_seeds(tiny: Any) -> None:
    planned = plan_sweep(tiny(), {"seed": [3, 7], "optim.lr": [0.1, 0.2]})
    assert list(planned) == [f"optim.lr={lr}-seed{seed}" for lr in (0.1, 0.2) for seed in (3, 7)]
    assert [(r.optim.lr, r.seed) for r in planned.values()] == [(0.1, 3), (0.1, 7), (0.2, 3), (0.2, 7)]
    with pytest.raises(RecipeError, match=r"^grid: seed: got both this and seeds, give one$"):
        plan_sweep(tiny(), {"seed": [3, 7]}, [1])
    with pytest.raises(RecipeError, match=r"seed: got 'three', must be a whole number"):
        plan_sweep(tiny(), {"seed": ["three"]})


def test_seeds_and_fields_of_no_values_are_not_the_recipes_own(tiny: Any, tmp_path: Path) -> None:
    for grid, seeds, field in (({}, [], "seed"), ({"seed": []}, None, "seed"), ({"optim.lr": []}, [1], r"optim\.lr")):
        with pytest.raises(RecipeError, match=rf"^{field}: got no values, of which every one makes a run; give"):
            plan_sweep(tiny(), grid, seeds)
    with pytest.raises(RecipeError, match=r"^seed: got no values"):
        train_seeds(tiny(), [], tmp_path, max_steps=1, device="cpu")
    assert list(plan_sweep(tiny(seed=5), {}, None)) == ["seed5"]


def test_a_grid_over_kinds_leaves_the_defaults_of_the_other_kinds_out() -> None:
    recipe = parse_recipe(
        {
            "epochs": 1,
            "model": {"name": "mlp4x24"},
            "data": {"name": "digits", "batch_size": 64},
            "optim": {"name": "sgd", "lr": 0.1},
        }
    )
    grid = {"optim.name": ["sgd", "adam"], "schedule.name": ["constant", "onecycle"]}
    planned = list(plan_sweep(recipe, grid).values())
    assert [(type(r.optim).__name__, type(r.schedule).__name__) for r in planned] == [
        ("Sgd", "Constant"),
        ("Sgd", "OneCycle"),
        ("Adam", "Constant"),
        ("Adam", "OneCycle"),
    ]
    assert planned[0] == recipe


def test_a_field_given_twice_is_an_error_and_not_the_last_one() -> None:
    with pytest.raises(RecipeError, match=r"optim\.lr came before; give all of its values at once, as A,B"):
        parse_grid(["optim.lr=0.1", "seed=1,2", "optim.lr=0.01"])


def test_whatever_a_run_raises_the_others_go_on(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attempts.train

    def breaks(recipe: Any, **options: Any) -> Any:
        assert recipe.seed != 1, "Input height (8) doesn't match model (224)."
        return real(recipe, **options)

    monkeypatch.setattr(attempts, "train", breaks)
    runs = sweep(tiny(), {}, [1, 2], tmp_path, max_steps=2, device="cpu")
    assert [run.summary["status"] for run in runs] == ["failed", "done"]
    assert "AssertionError(" in runs[0].summary["error"]
    assert "doesn't match model (224)." in runs[0].summary["error"]
    assert (tmp_path / "summary.json").exists()
