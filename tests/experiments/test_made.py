"""When, on what and of which source data were made: all machines and precisions that runs differ in."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from condzoo.experiments import collect, load_experiment
from condzoo.experiments.figures import small_print
from condzoo.experiments.made import joined, made_of, made_on
from condzoo.experiments.report import scale_section
from condzoo.experiments.training import made_by
from condzoo.training.run_directory import ENVIRONMENT
from tests.experiments.made_up import run_of

DATA = Path(__file__).parents[2] / "docs" / "data"


def environment(processor: str, commit: str | None = "c0ffee", torch: str = "2.14.1") -> dict[str, Any]:
    """A record of environment.json, as far as it counts here."""
    return {
        "processor": processor,
        "threads": 1,
        "device": "cpu",
        "python": "3.11.7",
        "packages": {"torch": torch, "condzoo": "0.1.0"},
        "source": commit and {"commit": commit},
    }


def test_every_machine_of_every_run_is_named_once_those_that_took_it_up_too(tmp_path: Path) -> None:
    runs: list[Any] = []
    for name, records in {
        "a": [environment("laptop")],
        "b": [environment("laptop"), environment("server", "beef", "2.15.0")],
        "c": [environment("laptop", None)],
        "d": [],
    }.items():
        (tmp_path / name).mkdir()
        runs.append(SimpleNamespace(path=tmp_path / name))
        if records:
            (tmp_path / name / ENVIRONMENT).write_text(json.dumps(records))
    made = joined(made_by(runs))
    assert made["hardware"] == "laptop, 1 thread(s), cpu; server, 1 thread(s), cpu"
    assert (made["torch"], made["commit"], made["python"]) == ("2.14.1; 2.15.0", "c0ffee; beef", "3.11.7")
    assert joined([made, made]) == made
    assert joined([made_of(environment("laptop", None))])["commit"] is None


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '[{"python": "3.11"}]', '[{"packages": []}]'])
def test_a_damaged_record_of_a_machine_says_what_to_do_here(content: str, tmp_path: Path) -> None:
    (tmp_path / ENVIRONMENT).write_text(content)
    runs: list[Any] = [SimpleNamespace(path=tmp_path)]
    with pytest.raises(ValueError, match=r"environment\.json is damaged; delete it, and give the `reproduce` command"):
        made_by(runs)
    (tmp_path / ENVIRONMENT).unlink()
    assert made_by(runs) == []


def test_precisions_are_named_where_runs_differ_in_them() -> None:
    experiment = load_experiment("fig11")
    data = json.loads((DATA / "fig11.json").read_text())
    assert made_on(data) == data["made"]["hardware"], "of before precisions were kept"
    data["runs"] = [run | {"precision": "fp32"} for run in data["runs"]]
    assert made_on(data) == data["made"]["hardware"]
    data["runs"][0]["precision"] = "bf16"
    said = f"{data['made']['hardware']} (1 run in bf16, {len(data['runs']) - 1} runs in fp32)"
    assert said in small_print(data, experiment)
    assert said in "\n".join(scale_section(experiment, data, "figures"))
    assert made_on({"made": {"hardware": "x"}, "runs": [run_of("a", 1)]}) == "x"


def test_a_run_s_precision_is_kept(tiny: Any, tmp_path: Path) -> None:
    data = collect(tiny("fig11"), "cpu", tmp_path, only=["(a)*"])
    assert [run["precision"] for run in data["runs"]] == ["fp32"]
    assert data["made"]["condzoo"] is not None
