"""Experiments that train: run what is missing, and take the numbers out of the run directories.

Shapes: S probed steps, K layers.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from condzoo.experiments.loading import PlannedRun, planned_runs, training_of
from condzoo.experiments.made import made_of
from condzoo.experiments.schema import Experiment, TrainingSettings
from condzoo.probe import Conditioning, LayerConditioning, read_records
from condzoo.training import Run
from condzoo.training.data_sets import read_data
from condzoo.training.events import OnEvent
from condzoo.training.many_runs import run_all
from condzoo.training.run_directory import (
    CONDITIONING,
    ENVIRONMENT,
    METRICS,
    RunDirectoryError,
    read_json,
    read_metrics,
)

DIGITS = 5  # significant ones that are kept
LOSS_POINTS, EPOCHS, PROBED_STEPS = 200, 100, 100  # of a run that are kept, at most
KAPPA = re.compile(r"(input|grad)_kappa(\d+)")
LAYER_VALUES: dict[str, Callable[[LayerConditioning], float | None]] = {
    "input_lambda_max": lambda layer: layer.input.lambda_max,
    "grad_lambda_max": lambda layer: layer.output_grad.lambda_max,
    "fisher_lambda_max": lambda layer: layer.fisher.lambda_max,
    "weight_domination": lambda layer: layer.weight_domination,
}
UNIT_VALUES = ("dying", "full")  # shares, by ReLU


def collect_trainings(
    experiment: Experiment,
    scale: str,
    out: Path,
    *,
    seeds: Sequence[int] | None = None,
    data: dict[str, Any] | None = None,
    only: Sequence[str] | None = None,
    engine: str = "local",
    data_root: str | Path | None = None,
    device: str | None = None,
    on_event: OnEvent | None = None,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train what is not yet there under out/runs, and return the numbers of all runs.

    Args:
        before: an earlier call's data, of which the runs need not be there any more.
        experiment, scale, out, seeds, data, only, engine, data_root, device, on_event: as for `collect`.

    Raises:
        ValueError, FileNotFoundError: see `planned_runs`; data that are not there, before a run directory is made.
        Stopped: on a signal; the same call goes on.
    """
    assert experiment.training is not None
    planned = {run_folder(run): run for run in planned_runs(experiment, scale, seeds, data, only)}
    folder = runs_folder(experiment, scale, out)
    before = before or {}
    known = known_rows(planned, before.get("runs", []), experiment.training)
    recipes = {name: run.recipe for name, run in planned.items() if name not in known}
    for recipe in {recipe.data.name: recipe for recipe in recipes.values()}.values():
        read_data(recipe, data_root)
    runs = run_all(recipes, folder, engine=engine, data_root=data_root, device=device, on_event=on_event)
    taken = {name: take_run(planned[name], run, experiment.training) for name, run in zip(recipes, runs, strict=True)}
    rows = [known[name] if name in known else taken[name] for name in planned]
    mark_chosen(rows, training_of(experiment))
    rows = [thinned(row) for row in rows]
    seconds = sum(row["seconds"] or 0.0 for row in rows)
    made = [*([before["made"]] if known else []), *made_by(runs)]
    return {"runs": rows, "seconds": seconds, "made": made, "kept": len(known)}


def runs_folder(experiment: Experiment, scale: str, out: Path) -> Path:
    """Where an experiment's runs are; those it shares are in their owner's."""
    return out / "runs" / f"{training_of(experiment).id}-{scale}"


def known_rows(
    planned: Mapping[str, PlannedRun], before: Sequence[dict[str, Any]], settings: TrainingSettings
) -> dict[str, dict[str, Any]]:
    """Folder name -> the rows of an earlier call's data of which no run is needed any more."""
    named = {row_name(row): row for row in before}
    return {name: row for name, row in named.items() if name in planned and is_whole(row, planned[name], settings)}


def run_folder(run: PlannedRun) -> str:
    """A folder's name that says which run it is."""
    return name_of(run.label, run.variant, run.recipe.seed)


def row_name(row: dict[str, Any]) -> str:
    """The folder's name of a run in an experiment's data."""
    return name_of(row["label"], row["variant"], row["seed"])


def name_of(label: str, variant: dict[str, Any], seed: int) -> str:
    """The folder's name of a curve's run: the point of its grid, and the seed."""
    return plain_name("-".join([label, *(f"{field}={value}" for field, value in variant.items()), f"seed{seed}"]))


def is_whole(row: dict[str, Any], planned: PlannedRun, settings: TrainingSettings) -> bool:
    """Whether a run in an experiment's data is of this recipe, finished, and has all numbers that are asked for."""
    same = row.get("recipe") == digest(planned.recipe)
    return same and row["status"] != "failed" and row["chosen"] and set(settings.quantities) <= row["quantities"].keys()


def digest(settings: BaseModel) -> str:
    """What tells one recipe from another: of the fields that are not at their defaults, which versions may add to."""
    fields = settings.model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def plain_name(text: str) -> str:
    """Words as a file's or folder's name."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def take_run(planned: PlannedRun, run: Run, settings: TrainingSettings) -> dict[str, Any]:
    """The numbers of one run; `status` is done, diverged or failed."""
    summary = run.summary
    row: dict[str, Any] = {"label": planned.label, "variant": planned.variant, "seed": planned.recipe.seed}
    row |= {"recipe": digest(planned.recipe), "root": planned.recipe.data.root}
    row |= {key: summary.get(key) for key in ("status", "steps", "train_loss", "test_error", "seconds", "error")}
    row |= {"diverged": summary.get("diverged"), "classes": summary.get("num_classes")}
    row["precision"] = summary.get("precision")
    row["test_error"] = None if row["status"] == "diverged" else row["test_error"]
    if row["status"] == "failed":
        return row | {"loss": [], "epochs": [], "probed": [], "quantities": {}}
    lines = read_metrics(run.path / METRICS)
    row["loss"] = [[line["step"], rounded(line["loss"])] for line in lines if line["kind"] == "step"]
    row["epochs"] = [epoch_row(line) for line in lines if line["kind"] != "step"]
    records = read_records(run.path / CONDITIONING) if (run.path / CONDITIONING).exists() else []
    row["probed"] = [record.step for record in records]
    row["quantities"] = {name: take_quantity(records, name, settings) for name in settings.quantities}
    return row


def epoch_row(line: dict[str, Any]) -> dict[str, Any]:
    """An epoch's line of metrics.jsonl, as the figures need it."""
    train_accuracy = line.get("train_accuracy")
    return {
        "step": line["step"],
        "train_loss": rounded(line.get("train_loss")),
        "train_error": None if train_accuracy is None else rounded(1 - train_accuracy),
        "test_error": rounded(line.get("test_error")),
    }


def take_quantity(records: Sequence[Conditioning], name: str, settings: TrainingSettings) -> dict[str, Any]:
    """One quantity as {"layers": K names, "values": [S, K]}; None where a value is not known.

    Raises:
        ValueError: a quantity that there is not.
    """
    if name in UNIT_VALUES:
        layers = list(dict.fromkeys(key for record in records for key in record.neurons))
        values = [[unit_share(record, layer, name) for layer in layers] for record in records]
        return {"layers": layers, "values": values}
    take = layer_value(name)
    layers = list(dict.fromkeys(key for record in records for key in record))
    layers = layers[-1:] if settings.last_layer_only else layers
    values = [[rounded(take(record[layer])) if layer in record else None for layer in layers] for record in records]
    return {"layers": layers, "values": values}


def layer_value(name: str) -> Callable[[LayerConditioning], float | None]:
    """What a quantity's name stands for: one of LAYER_VALUES, or kappa at a percentage ("input_kappa50")."""
    if name in LAYER_VALUES:
        return LAYER_VALUES[name]
    match = KAPPA.fullmatch(name)
    if match is None:
        known = ", ".join([*LAYER_VALUES, "input_kappa50", "grad_kappa50 (any percentage)", *UNIT_VALUES])
        raise ValueError(f"unknown quantity {name!r}; there are: {known}")
    side, p = ("input" if match[1] == "input" else "output_grad"), int(match[2]) / 100
    return lambda layer: getattr(layer, side).condition_number(p)


def unit_share(record: Conditioning, layer: str, name: str) -> float | None:
    """The share of dying or full units of a ReLU."""
    neurons = record.neurons.get(layer)
    return None if neurons is None else rounded(getattr(neurons, f"{name}_share"))


def rounded(value: float | None) -> float | None:
    """A number as it is kept: a few digits, None where it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def mark_chosen(rows: list[dict[str, Any]], owner: Experiment) -> None:
    """Set row["chosen"]: of each label's grid the point with the lowest median final training loss over seeds."""
    assert owner.training is not None
    for spec in owner.training.runs:
        own = [row for row in rows if row["label"] == spec.label]
        losses: dict[str, list[float]] = {}
        for row in own:
            done = row["status"] == "done" and row["train_loss"] is not None
            losses.setdefault(str(row["variant"]), []).append(row["train_loss"] if done else math.inf)
        medians = {variant: statistics.median(values) for variant, values in losses.items()}
        best = min(medians, key=medians.__getitem__, default=None)
        for row in own:
            row["chosen"] = spec.choose == "all" or str(row["variant"]) == best


def thinned(row: dict[str, Any]) -> dict[str, Any]:
    """A run as it is kept: of those that were not chosen only what became of them; of many steps and epochs some."""
    kept = spread(len(row["probed"]), PROBED_STEPS)
    quantities = {
        name: {**table, "values": [table["values"][i] for i in kept]} for name, table in row["quantities"].items()
    }
    row = {
        **row,
        "loss": [row["loss"][i] for i in spread(len(row["loss"]), LOSS_POINTS)],
        "epochs": [row["epochs"][i] for i in spread(len(row["epochs"]), EPOCHS)],
        "probed": [row["probed"][i] for i in kept],
        "quantities": quantities,
    }
    return row if row["chosen"] else {**row, "loss": [], "epochs": row["epochs"][-1:], "probed": [], "quantities": {}}


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly, the first and the last always; all of them where they are few."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def made_by(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """On what each run was begun and, where it was stopped, taken up; nothing of one without an environment.json.

    Raises:
        ValueError: that file is damaged.
    """
    found: list[dict[str, Any]] = []
    for path in (run.path / ENVIRONMENT for run in runs):
        try:
            found += map(made_of, read_json(path) if path.exists() else [])
        except (RunDirectoryError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged; delete it, and give the `reproduce` command again") from error
    return found
