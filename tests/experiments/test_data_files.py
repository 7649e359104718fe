"""Data files that lack a piece are named with it, and those of other settings are not taken for finished."""

import json
from pathlib import Path

import pytest

from condzoo.cli import main
from condzoo.experiments import collect, report

DATA = Path(__file__).parents[2] / "docs" / "data"


def without(name, path):
    """The data of an experiment, less one piece."""
    data = json.loads((DATA / f"{name}.json").read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


def plotted(tmp_path, data, capsys):
    """The data's file, and the one line that `condzoo plot` ends with."""
    target = tmp_path / "damaged.json"
    target.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as stop:
        main(["plot", str(target)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not target.with_suffix(".png").exists()
    return target, line


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("fig11", ["runs"], "runs"),
        ("fig11", ["runs", 1, "quantities"], "quantities in runs[1]"),
        ("fig01", ["networks"], "networks"),
        ("fig01", ["networks", 0, "matrices"], "matrices in networks[0]"),
        ("fig01", ["p"], "p"),
        ("thm1", ["trials"], "trials"),
        ("cost", ["points"], "points"),
        ("cost", ["points", 2, "seconds"], "seconds in points[2]"),
        ("thm1", ["made"], "made"),
    ],
)
def test_data_that_lack_a_piece_are_one_line(name, path, said, tmp_path, capsys):
    target, line = plotted(tmp_path, without(name, path), capsys)
    assert line == f"error: {target} is damaged: it has no {said}; delete it, and give the `reproduce` command again"


def test_an_empty_list_is_a_missing_piece(tmp_path, capsys):
    data = json.loads((DATA / "thm1.json").read_text()) | {"trials": []}
    (tmp_path / "thm1.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path / "thm1.json")])
    assert "thm1.json is damaged: it has no trials; delete it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "key", "count"),
    [
        ("thm1", {"trials": 3}, "trials", 3),
        ("fig01", {"examples": 12}, "networks", 2),
        ("cost", {"widths": [4]}, "points", 5),
    ],
)
def test_data_of_other_settings_are_not_taken_for_finished(name, change, key, count, tiny, tmp_path):
    experiment = tiny(name)
    first = collect(experiment, "cpu", tmp_path)
    assert collect(experiment, "cpu", tmp_path) == first
    scale = experiment.scales["cpu"]
    changed = scale.model_copy(update={"settings": {**scale.settings, **change}})
    again = collect(experiment.model_copy(update={"scales": {"cpu": changed}}), "cpu", tmp_path)
    assert again["settings"] != first["settings"]
    assert len(again[key]) == count

    del again["settings"]  # files of before say nothing of their settings
    (tmp_path / f"{name}.json").write_text(json.dumps(again))
    assert collect(experiment, "cpu", tmp_path) == again


@pytest.mark.parametrize(
    ("name", "path", "lacking"),
    [
        ("thm1", ["made", "hardware"], "'hardware'"),
        ("thm1", ["trials", 1, "errors", "input"], "'input'"),
        ("cost", ["points", 3, "seconds", "full"], "'full'"),
        ("fig01", ["networks", 0, "matrices", "fisher", "full", "kappa"], "'kappa'"),
    ],
)
def test_a_piece_that_is_lacking_deep_within_is_one_line(name, path, lacking, tmp_path, capsys):
    target, line = plotted(tmp_path, without(name, path), capsys)
    assert line == f"error: {target} is damaged: it has no {lacking}; delete it, and give the `reproduce` command again"


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"id": ["thm1"]},
        {"id": "fig99"},
        {"seeds": None},
        {"seeds": [9]},
        {"made": "now"},
        {"reductions": None},
    ],
)
def test_a_piece_of_another_kind_is_one_line_that_names_the_file(change, tmp_path, capsys):
    data = json.loads((DATA / "thm1.json").read_text()) | change
    target, line = plotted(tmp_path, data, capsys)
    assert line.startswith(f"error: {target} is damaged: ")
    assert line.endswith("; delete it, and give the `reproduce` command again")


def test_what_cannot_be_drawn_names_its_file_and_so_does_what_cannot_be_reported(tmp_path, capsys):
    data = json.loads((DATA / "fig11.json").read_text())
    for run in data["runs"]:
        run["probed"] = run["probed"][:-1]
    target, line = plotted(tmp_path, data, capsys)
    assert line.startswith(f"error: {target}: ")

    data = json.loads((DATA / "thm1.json").read_text())
    del data["made"]["torch"]
    (tmp_path / "thm1.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"thm1\.json is damaged: it has no 'torch'; delete it"):
        report(tmp_path)


def test_a_copy_that_was_kept_is_drawn_beside_it(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("condzoo.experiments.draw", lambda _, data, png: drawn.append((data["id"], png.name)))
    names = {"thm1.json": "thm1.png", "thm1.json.bak": "thm1.bak.png", "x.paper.json.bak12": "x.paper.bak12.png"}
    for name in names:
        (tmp_path / name).write_bytes((DATA / "thm1.json").read_bytes())
        with pytest.raises(SystemExit) as stop:
            main(["plot", str(tmp_path / name)])
        assert not stop.value.code, capsys.readouterr().err
    assert drawn == [("thm1", picture) for picture in names.values()]
