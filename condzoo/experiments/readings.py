"""Reading an experiment's data: the runs of a curve, their quantities as arrays, and small statistics.

Shapes: S probed steps, K layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Data = dict[str, Any]
Values = dict[int, float]
LOGARITHMIC = ("lambda_max", "kappa", "weight_domination")


class Missing(ValueError):
    """The data do not hold what a claim is about."""


def runs_of(data: Data, label: str) -> list[dict[str, Any]]:
    """The chosen runs of one curve, a seed each.

    Raises:
        Missing: there are none.
    """
    found = [run for run in data["runs"] if run["label"] == label and run["chosen"]]
    if not found:
        raise Missing(f"no run {label!r}")
    return found


def ended_runs(data: Data, label: str) -> list[dict[str, Any]]:
    """The chosen runs of one curve that were trained to their end: what a diverged one recorded is its beginning.

    Raises:
        Missing: there are none.
    """
    found = [run for run in runs_of(data, label) if run["status"] == "done"]
    if not found:
        raise Missing(f"no run {label!r} ended")
    return found


def runs_at(data: Data, label: str, at: str) -> list[dict[str, Any]]:
    """The chosen runs of one curve that have the steps a claim is about; see `rows_of`."""
    return runs_of(data, label) if at == "start" else ended_runs(data, label)


def table_of(run: dict[str, Any], quantity: str) -> np.ndarray:
    """One run's quantity as [S, K]: log10 of all but shares (-inf of 0), NaN where not known.

    Raises:
        Missing: it was not measured.
    """
    kept = run["quantities"].get(quantity)
    if kept is None or not kept["values"]:
        raise Missing(f"{run['label']}, seed {run['seed']}: {quantity} was not measured ({run['status']})")
    values = np.array(kept["values"], dtype=float)
    if not any(word in quantity for word in LOGARITHMIC):
        return values
    with np.errstate(divide="ignore"):
        return np.log10(values)


def rows_of(run: dict[str, Any], quantity: str, at: str) -> np.ndarray:
    """The rows of `table_of` that a claim is about: "start", "end", or "all" but the first.

    Raises:
        Missing: it was not measured, or at the start alone where a claim is about what follows.
    """
    table = table_of(run, quantity)
    if at != "start" and len(table) < 2:
        raise Missing(f"{run['label']}, seed {run['seed']}: {quantity} was measured at one step alone")
    return {"start": table[:1], "end": table[-1:], "all": table[1:]}[at]


def paired(
    data: Data, label: str, to: str, take: Callable[[Data, str], list[dict[str, Any]]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The entries of two curves with the same seed, of those that `take` finds under a label.

    Raises:
        Missing: no seed has both.
    """
    others = {entry["seed"]: entry for entry in take(data, to)}
    found = [(entry, others[entry["seed"]]) for entry in take(data, label) if entry["seed"] in others]
    if not found:
        raise Missing(f"{label} and {to} have no seed in common")
    return found


def networks_of(data: Data, label: str) -> list[dict[str, Any]]:
    """The networks measured under a label, a seed each."""
    found = [network for network in data["networks"] if network["label"] == label]
    if not found:
        raise Missing(f"no network {label!r}")
    return found


def finals(data: Data, label: str, metric: str) -> Values:
    """A metric of every run that ended: of its summary, or "last_loss", the median of the last tenth of logged losses.

    The summary's training loss is the mean of the last epoch. Of a run that has no two epochs that would be the mean of
    all that it went through: there "train_loss" is the last loss, too.

    The "train_error" is that of the last epoch, or of the part of one that was trained.

    Raises:
        Missing: none ended with it.
    """
    ended = [run for run in runs_of(data, label) if run["status"] == "done"]
    values = {run["seed"]: final_metric(run, metric) for run in ended}
    found = {seed: float(value) for seed, value in values.items() if value is not None}
    if not found:
        raise Missing(f"no run {label!r} ended with a {metric}")
    return found


def final_metric(run: dict[str, Any], metric: str) -> float | None:
    """One run's metric at its end; see `finals`."""
    if metric == "train_error":
        return run["epochs"][-1][metric] if run["epochs"] else None
    short = metric == "train_loss" and len(run["epochs"]) < 2
    value = last_loss(run) if short or metric == "last_loss" else run[metric]
    return run[metric] if short and value is None else value  # its losses were not logged


def last_loss(run: dict[str, Any]) -> float | None:
    """The median of the last tenth of the losses that were logged; None where there are none."""
    losses = [loss for _, loss in run["loss"] if loss is not None]
    return float(np.median(losses[-max(1, len(losses) // 10) :])) if losses else None


def fitted_slope(row: np.ndarray) -> float:
    """Least-squares slope over the places whose value is known; NaN of fewer than three."""
    known = np.isfinite(row)
    return float(np.polyfit(np.flatnonzero(known), row[known], 1)[0]) if known.sum() >= 3 else math.nan


def errors_by_seed(data: Data, quantity: str) -> dict[int, list[float]]:
    """One quantity's values of a seed's trials; NaN where one was not finite, which the data keep as null."""
    found: dict[int, list[float]] = {}
    for trial in data["trials"]:
        value = trial["errors"][quantity]
        found.setdefault(trial["seed"], []).append(math.nan if value is None else value)
    return found


def points_by_seed(data: Data) -> dict[int, list[dict[str, Any]]]:
    """The sizes that were timed, by seed; data of before times were taken by seed have one set of them, here seed 0."""
    found: dict[int, list[dict[str, Any]]] = {}
    for point in data["points"]:
        found.setdefault(point.get("seed", 0), []).append(point)
    return found


def fitted_exponent(points: Sequence[dict[str, Any]], over: str, way: str) -> float:
    """The slope of log seconds over log size, least squares in the larger half of the sizes of one seed."""
    chosen = sorted((p for p in points if p["varied"] == over), key=lambda point: point[over])
    chosen = chosen[len(chosen) // 2 :] if len(chosen) > 3 else chosen
    sizes = [math.log(point[over]) for point in chosen]
    return float(np.polyfit(sizes, [math.log(point["seconds"][way]) for point in chosen], 1)[0])


def known_median(values: Sequence[float], what: str) -> float:
    """The median of what is known, which NaN is not; it may be infinite.

    Raises:
        Missing: nothing is.
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        raise Missing(f"{what} is not known at enough layers")
    return float(np.median(known))


def spearman(values: Sequence[float]) -> float:
    """Rank correlation of values with their place; ties share their ranks."""
    array = np.asarray(values)
    ranks = np.array([(np.sum(array < v) + np.sum(array <= v) - 1) / 2 for v in array])
    places = np.arange(len(array), dtype=float)
    if np.ptp(ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks, places)[0, 1])
