"""What is known before anything is run: data sets that are not there, runs that are finished."""

import shutil
from pathlib import Path

import pytest

from condzoo.cli import main
from condzoo.commands.reproduce import time_ahead
from condzoo.experiments import collect, estimated_minutes, load_experiment, read_data_file
from condzoo.experiments.planning import one_seed_alone
from condzoo.training import Stopped


def test_a_missing_data_set_is_told_before_the_first_experiment(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "thm1", "fig01", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: data set 'mnist' was not found; looked for")
    assert not (tmp_path / "out").exists(), "the first experiment was run"


def test_runs_that_are_finished_take_no_time(tiny, tmp_path):
    experiment = tiny("fig11")
    minutes = experiment.scales["cpu"].minutes
    assert estimated_minutes([experiment], "cpu", out=tmp_path) == pytest.approx(minutes)
    collect(experiment, "cpu", tmp_path, only=["(a)*"])
    assert estimated_minutes([experiment], "cpu", out=tmp_path) == pytest.approx(minutes / 2)
    collect(experiment, "cpu", tmp_path)
    assert estimated_minutes([experiment], "cpu", out=tmp_path) == 0
    assert estimated_minutes([experiment], "cpu", [1, 2], out=tmp_path) == pytest.approx(minutes)


def test_the_files_say_what_was_measured():
    expected = {"fig04": 10, "fig09": 35, "fig10": 57, "fig11": 12}
    assert {name: load_experiment(name).scales["cpu"].minutes for name in expected} == expected


def test_one_seed_which_decides_no_claim_is_told_before_it_is_run(tiny, tmp_path, monkeypatch, capsys):
    experiments = [load_experiment(name) for name in ("thm1", "cost", "fig01", "fig05", "fig10", "fig14", "table_a")]
    assert one_seed_alone(experiments, "paper") == ["fig10", "fig14", "table_a"]
    assert one_seed_alone(experiments, "paper", [1, 2]) == []
    assert one_seed_alone(experiments, "cpu", [7]) == ["fig01", "fig05", "fig10", "fig14", "table_a"]

    experiment = tiny("fig01")
    monkeypatch.setattr("condzoo.experiments.load_experiment", lambda _: experiment)
    monkeypatch.setattr("condzoo.experiments.collect", lambda *_, **__: (_ for _ in ()).throw(Stopped("enough")))
    with pytest.raises(SystemExit):
        main(["reproduce", "fig01", "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    said = "one seed decides no claim: fig01; several do, e.g. by --seeds 1-3"
    assert -1 < printed.find(said) < printed.index("[1/1] fig01")


def test_one_of_several_processes_is_told_to_leave_torchrun_out(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "thm1", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == (
        "error: `reproduce` is one process, and torchrun has started 2; leave torchrun out (--engine ray trains many "
        "runs at a time)"
    )
    with pytest.raises(ValueError, match="leave torchrun out"):
        collect(load_experiment("thm1"), "cpu", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_on_another_folder_of_images_are_still_ahead(tmp_path):
    data = Path(__file__).parents[2] / "docs" / "data" / "fig14.json"
    shutil.copy(data, tmp_path)
    experiment, options = load_experiment("fig14"), {"seeds": None, "only": None}
    same = Path(read_data_file(data)["runs"][0]["root"])
    assert time_ahead([experiment], "cpu", tmp_path, same, options).endswith("; 1 finished before")
    whole = f"about {estimated_minutes([experiment], 'cpu'):.3g} minutes in all"
    assert time_ahead([experiment], "cpu", tmp_path, tmp_path / "other", options).endswith(whole)


@pytest.mark.parametrize("below", ["below", "below/deeper"])
def test_a_folder_that_cannot_be_made_is_told_before_anything_is_run(below, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("condzoo.experiments.collecting.collect_theory", lambda *_: pytest.fail("it was run"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / below
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "thm1", "--out", str(out)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --out {out}: the folder cannot be made ([Errno ")
    assert line.endswith("); name another one")
    with pytest.raises(OSError, match="file"):
        collect(load_experiment("thm1"), "cpu", out)
