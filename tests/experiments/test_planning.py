"""What is known before anything is run: data sets that are not there, runs that are finished."""

import pytest

from condzoo.cli import main
from condzoo.experiments import collect, estimated_minutes, load_experiment


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
