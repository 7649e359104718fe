"""Data files that lack a piece are named with it, and those of other settings are not taken for finished."""

import json
from pathlib import Path

import pytest

from condzoo.cli import main
from condzoo.experiments import collect

DATA = Path(__file__).parents[2] / "docs" / "data"


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
    data = json.loads((DATA / f"{name}.json").read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    target = tmp_path / f"{name}.json"
    target.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as stop:
        main(["plot", str(target)])
    assert stop.value.code == 2
    message = f"error: {target} is damaged: it has no {said}; delete it, and give the `reproduce` command again"
    assert capsys.readouterr().err.strip() == message


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
