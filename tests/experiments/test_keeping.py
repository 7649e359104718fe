"""What an earlier call has measured is nowhere lost: in the new data, in its folder, or in a copy beside the file."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import condzoo
from condzoo.experiments import Experiment, collect, collecting, finished, load_experiment
from condzoo.experiments.data_files import SCHEMA
from condzoo.experiments.loading import planned_runs
from condzoo.experiments.training import digest, row_name
from condzoo.training import Notice
from condzoo.training.run_directory import SUMMARY, write_json
from tests.experiments.made_up import entry, run_of

SEEDS = [1, 2, 3, 4, 5]


def rows_of(experiment: Experiment, seeds: Sequence[int], **fields: Any) -> list[dict[str, Any]]:
    """A made-up finished row of each run."""
    common = {"steps": 7, "seconds": 1.0, "error": None} | fields
    return [
        run_of(run.label, run.recipe.seed, variant=run.variant, recipe=digest(run.recipe), **common)
        for run in planned_runs(experiment, "cpu", seeds)
    ]


def slower(experiment: Experiment) -> Experiment:
    """The same with another learning rate."""
    scale = experiment.scales["cpu"]
    changed = scale.model_copy(update={"recipe": {**scale.recipe, "optim.lr": 0.0123}})
    return experiment.model_copy(update={"scales": {**experiment.scales, "cpu": changed}})


def copies(out: Path) -> list[str]:
    """The names of the copies, and of nothing else."""
    return sorted(path.name for path in out.glob("*.bak*"))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Trainings that are made up; the dict holds fields of every row."""
    fields: dict[str, Any] = {}

    def instead(experiment: Experiment, _scale: str, _out: Path, *, seeds: Sequence[int], **_: Any) -> dict[str, Any]:
        return {"runs": rows_of(experiment, seeds, **fields), "seconds": 1.0}

    monkeypatch.setattr(collecting, "collect_trainings", instead)
    return fields


@pytest.mark.usefixtures("pretended")
def test_a_copy_is_never_written_over_another(tmp_path: Path) -> None:
    experiment = load_experiment("fig11")
    told: list[Any] = []
    for seeds in (SEEDS, [1], [2], [3]):
        collect(experiment, "cpu", tmp_path, seeds=seeds, on_event=told.append)
    kept = [json.loads((tmp_path / f"fig11.json.bak{number}").read_text())["seeds"] for number in ("", 2, 3)]
    assert kept == [SEEDS, [1], [2]]
    assert told[0] == Notice(f"{tmp_path / 'fig11.json.bak'}: what was in fig11.json and is nowhere else")
    assert copies(tmp_path) == ["fig11.json.bak", "fig11.json.bak2", "fig11.json.bak3"]


@pytest.mark.usefixtures("pretended")
def test_of_runs_that_lie_in_their_folders_no_copy_is_kept(tmp_path: Path) -> None:
    experiment = load_experiment("fig11")
    for row in collect(experiment, "cpu", tmp_path, seeds=[1, 2])["runs"]:
        folder = tmp_path / "runs" / "fig11-cpu" / row_name(row)
        folder.mkdir(parents=True)
        write_json(folder / SUMMARY, {key: row[key] for key in ("status", "steps", "train_loss")} | {"epochs": 1})
    collect(experiment, "cpu", tmp_path, seeds=[2])
    assert not copies(tmp_path)


def test_runs_of_another_recipe_are_kept_and_none_gives_way_to_one_that_failed(
    pretended: dict[str, Any], tmp_path: Path
) -> None:
    experiment = load_experiment("fig11")
    path = tmp_path / "fig11.json"
    collect(experiment, "cpu", tmp_path, seeds=[1, 2])
    first = path.read_bytes()

    pretended["status"] = "failed"
    told: list[Any] = []
    data = collect(slower(experiment), "cpu", tmp_path, seeds=[1, 2], on_event=told.append)
    assert {row["status"] for row in data["runs"]} == {"failed"}, "what is shown is what happened"
    assert path.read_bytes() == first
    count = len(data["runs"])
    assert told == [
        Notice(f"{path} stays as it is, for it has {count} runs that failed now; `condzoo plot {path}` draws it again")
    ]
    assert not copies(tmp_path)

    pretended["status"] = "done"
    collect(slower(experiment), "cpu", tmp_path, seeds=[1, 2])
    assert (tmp_path / "fig11.json.bak").read_bytes() == first
    assert path.read_bytes() != first


@pytest.mark.usefixtures("pretended")
def test_another_experiment_s_file_in_this_place_is_kept(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "docs" / "data" / "thm2.json", tmp_path / "fig11.json")
    other = (tmp_path / "fig11.json").read_bytes()
    told: list[Any] = []
    for seeds in ([1], [1, 2]):
        collect(load_experiment("fig11"), "cpu", tmp_path, seeds=seeds, on_event=told.append)
    assert (tmp_path / "fig11.json.bak").read_bytes() == other
    assert copies(tmp_path) == ["fig11.json.bak"]
    assert told == [Notice(f"{tmp_path / 'fig11.json.bak'}: what was in fig11.json of another experiment or scale")]


def test_run_directories_of_another_recipe_leave_the_data_as_they_are(tiny: Any, tmp_path: Path) -> None:
    experiment = tiny("fig11")
    collect(experiment, "cpu", tmp_path, only=["(a)*"])
    path = tmp_path / "fig11.json"
    first = path.read_bytes()
    (run,) = collect(slower(experiment), "cpu", tmp_path, only=["(a)*"])["runs"]
    assert "belongs to another recipe" in run["error"]
    assert path.read_bytes() == first

    collect(experiment, "cpu", tmp_path, only=["(a)*"], seeds=[2])
    assert not copies(tmp_path), "seed 1 is in its folder"
    path.write_bytes(first)
    shutil.rmtree(tmp_path / "runs")
    collect(slower(experiment), "cpu", tmp_path, only=["(a)*"])
    assert (tmp_path / "fig11.json.bak").read_bytes() == first


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the networks measured, whose curvature is made up."""
    measured: list[int] = []

    def instead(_name: str, _settings: Any, seed: int, _root: Any) -> dict[str, Any]:
        measured.append(seed)
        return {"fisher": {"full": entry(float(seed)), "fc": entry(1.0)}}

    monkeypatch.setattr("condzoo.experiments.initialization.measure_network", instead)
    return measured


def test_networks_of_an_earlier_call_stay_even_where_their_folder_is_gone(counted: list[int], tmp_path: Path) -> None:
    experiment = load_experiment("fig01")
    first = collect(experiment, "cpu", tmp_path, seeds=[1, 2])
    shutil.rmtree(tmp_path / "runs")
    counted.clear()
    both = collect(experiment, "cpu", tmp_path, seeds=[1, 2, 3])
    assert set(counted) == {3}
    assert both["networks"][: len(first["networks"])] == first["networks"]
    assert both["seconds"] > first["seconds"]
    assert not copies(tmp_path)

    third = collect(experiment, "cpu", tmp_path, seeds=[3])
    assert copies(tmp_path) == ["fig01.json.bak"], "seed 1 is in no folder"
    assert json.loads((tmp_path / "fig01.json.bak").read_text()) == both
    collect(experiment, "cpu", tmp_path, seeds=[4])
    assert copies(tmp_path) == ["fig01.json.bak"], f"seed 3 is in its folder: {third['seeds']}"


def test_networks_of_another_version_are_measured_again(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment("fig01")
    with monkeypatch.context() as earlier:
        earlier.setattr("condzoo.__version__", "0.0.1")
        collect(experiment, "cpu", tmp_path / "a", seeds=[1])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "runs")

    def otherwise(_name: str, _settings: Any, seed: int, _root: Any) -> dict[str, Any]:
        counted.append(seed)
        return {"fisher": {"full": entry(9.0)}}

    monkeypatch.setattr("condzoo.experiments.initialization.measure_network", otherwise)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    # where the files of the networks are there, where the data alone are, and where nothing else is asked for
    for out, seeds in (("a", [1, 2]), ("b", [1, 2]), ("c", [1])):
        counted.clear()
        assert finished(experiment, "cpu", tmp_path / out, seeds=seeds) is None
        data = collect(experiment, "cpu", tmp_path / out, seeds=seeds)
        assert sorted(set(counted)) == seeds
        assert {network["matrices"]["fisher"]["full"]["lambda_max"] for network in data["networks"]} == {9.0}
        assert data["made"]["condzoo"] == condzoo.__version__
        assert copies(tmp_path / out) == ["fig01.json.bak"]
        assert finished(experiment, "cpu", tmp_path / out, seeds=seeds) == data


def test_data_without_a_quantity_that_is_asked_for_are_not_finished(tmp_path: Path) -> None:
    experiment = load_experiment("fig11")
    asked = experiment.training.quantities
    made = {"date": "2026-11-24", "hardware": "any", "torch": "2", "python": "3", "commit": None, "condzoo": None}
    for quantities, whole in ((asked, True), (asked[:1], False)):
        rows = rows_of(experiment, [1, 2], quantities={name: {"layers": [], "values": []} for name in quantities})
        data = {"id": "fig11", "scale": "cpu", "seeds": [1, 2], "reductions": [], "made": made, "seconds": 1.0}
        (tmp_path / "fig11.json").write_text(json.dumps({"schema": SCHEMA, **data, "runs": rows}))
        assert (finished(experiment, "cpu", tmp_path, seeds=[1, 2]) is not None) == whole


@pytest.mark.usefixtures("counted")
def test_data_of_networks_name_every_machine_that_they_were_measured_on(tmp_path: Path) -> None:
    experiment = load_experiment("fig01")
    here = collect(experiment, "cpu", tmp_path, seeds=[1])["made"]
    (tmp_path / "fig01.json").unlink()
    for path in (tmp_path / "runs").rglob("*.json"):
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | {"made": kept["made"] | {"hardware": "a laptop", "commit": "c0ffee"}}))
    both = collect(experiment, "cpu", tmp_path, seeds=[1, 2])["made"]
    assert both["hardware"] == f"a laptop; {here['hardware']}"
    assert both["commit"].startswith("c0ffee")
