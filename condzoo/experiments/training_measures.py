"""What the claims about trainings measure.

A measure takes an experiment's data and the claim's arguments, and returns {seed: value}; `Missing` says that the
data have no such value, which leaves the claim not decided.
What is measured at the start is of all runs, what follows ("end", "all" steps but the first) of those that ended: a
diverged run recorded its first steps alone, and its seed has no value.
Shapes: S probed steps, K layers.
"""

import math
from functools import partial
from typing import Any

import numpy as np

from condzoo.experiments.readings import (
    Data,
    Missing,
    Values,
    ended_runs,
    final_metric,
    finals,
    fitted_slope,
    known_median,
    paired,
    rows_of,
    runs_at,
    runs_of,
    spearman,
    table_of,
)


def slope_over_depth(data: Data, label: str, quantity: str, at: str = "start", skip_last: int = 1) -> Values:
    """Change of log10 of a quantity a layer towards the output: least squares, median over the steps chosen.

    `skip_last` leaves out the classifier, which has another width and no nonlinearity behind it.

    Raises:
        Missing: a layer is at 0, to which no line leads; leaving it out would flatter a network that has died.
    """
    values = {}
    for run in runs_at(data, label, at):
        table = rows_of(run, quantity, at)
        table = table[:, : table.shape[1] - skip_last]
        if dead := int(np.isneginf(table).any(axis=0).sum()):
            where = f"{dead} layer{'' if dead == 1 else 's'}"
            raise Missing(f"{label}, seed {run['seed']}: {quantity} is 0 at {where}")
        slopes = [fitted_slope(row) for row in table]
        values[run["seed"]] = known_median(slopes, f"{label}: {quantity}")
    return values


def spread_over_depth(data: Data, label: str, quantity: str, at: str = "start", skip_last: int = 1) -> Values:
    """Decades between the largest and the smallest layer of a quantity, median over the steps chosen; see `decades`."""
    values = {}
    for run in runs_at(data, label, at):
        table = rows_of(run, quantity, at)
        table = table[:, : table.shape[1] - skip_last]
        values[run["seed"]] = known_median([decades(row) for row in table], f"{label}: {quantity}")
    return values


def decades(row: np.ndarray) -> float:
    """The range of what is known of log10 values: infinite where some are of 0; NaN of none known, or of 0 alone."""
    known = row[~np.isnan(row)].tolist()
    return max(known) - min(known) if known else math.nan


def ratio_between(data: Data, label: str, to: str, quantity: str, at: str = "all", last: bool = False) -> Values:
    """How many times a quantity of one curve is another's: 10^median of log10 over layers and steps, seed by seed.

    `last` looks at the last layer alone. A kappa that is not known is infinite: its smallest eigenvalue is under the
    noise, so it is larger than those that are known, and leaving it out would flatter the network that has it.
    """
    values = {}
    for one, other in paired(data, label, to, partial(runs_at, at=at)):
        levels = []
        for run in (one, other):
            table = rows_of(run, quantity, at)
            table = table[:, -1:] if last else table
            levels.append(np.where(np.isnan(table), np.inf, table) if "kappa" in quantity else table)
        if not all(np.isfinite(level).any() for level in levels):
            raise Missing(f"{quantity} of {label} or {to} is not known at any layer")
        above, below = (float(np.nanmedian(level)) for level in levels)
        if above == below and math.isinf(above):
            raise Missing(f"{quantity} of {label} and {to} is {'not known' if above > 0 else '0'} at most layers")
        values[one["seed"]] = float(10 ** (above - below))
    return values


def variation_ratio(data: Data, label: str, to: str, quantity: str) -> Values:
    """Decades a layer's quantity goes through over the steps, largest over smallest, one curve's over another's.

    Of each curve the median over layers, the first step included; below 1 the first curve is the stabler one.
    """
    return {
        one["seed"]: quotient(*(variation(run, quantity) for run in (one, other)))
        for one, other in paired(data, label, to, ended_runs)
    }


def variation(run: dict[str, Any], quantity: str) -> float:
    """Decades between the largest and the smallest step of a layer, median over the layers where two are known.

    Raises:
        Missing: there is no such layer.
    """
    table = table_of(run, quantity)
    ranges = [decades(column) for column in table.T if np.count_nonzero(~np.isnan(column)) >= 2]
    return known_median(ranges, f"{run['label']}, seed {run['seed']}: {quantity} at two steps")


def median_share(data: Data, label: str, quantity: str, at: str = "end", part: str = "all") -> Values:
    """The mean over layers of a share (dying or full units); `part` "upper" and "lower" are halves by depth."""
    values = {}
    for run in runs_at(data, label, at):
        table = rows_of(run, quantity, at)
        half = table.shape[1] // 2
        table = {"all": table, "lower": table[:, :half], "upper": table[:, half:]}[part]
        values[run["seed"]] = known_median(np.nanmean(table, axis=1).tolist(), quantity)
    return values


def upper_minus_lower(data: Data, label: str, quantity: str, at: str = "end") -> Values:
    """The mean share in the upper half of the layers less that in the lower half."""
    upper, lower = (median_share(data, label, quantity, at, part) for part in ("upper", "lower"))
    return {seed: upper[seed] - lower[seed] for seed in upper}


def final_loss(data: Data, label: str) -> Values:
    """Training loss of the last epoch (or the part of one that was trained)."""
    return finals(data, label, "train_loss")


def loss_ratio(data: Data, label: str, to: str) -> Values:
    """Final training loss of one curve over another's."""
    one, other = finals(data, label, "train_loss"), finals(data, to, "train_loss")
    return {seed: quotient(one[seed], other[seed]) for seed in one if seed in other}


def final_error(data: Data, label: str) -> Values:
    """Test error at the end, %; chance (90, of ten classes) for a run that diverged."""
    return {
        run["seed"]: 100 * (run["test_error"] if run["test_error"] is not None else 1 - 1 / (run.get("classes") or 10))
        for run in runs_of(data, label)
        if run["status"] != "failed"
    }


def error_difference(data: Data, label: str, to: str) -> Values:
    """Test error of one curve less another's, percentage points, seed by seed."""
    one, other = final_error(data, label), final_error(data, to)
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def rank_correlation(data: Data, labels: list[str], metric: str = "test_error") -> Values:
    """Spearman's correlation of a final metric with the labels' order (1: it grows along the list)."""
    columns = [final_error(data, x) if metric == "test_error" else finals(data, x, metric) for x in labels]
    seeds = set.intersection(*(set(column) for column in columns))
    return {seed: spearman([column[seed] for column in columns]) for seed in sorted(seeds)}


def loss_fall(data: Data, label: str, metric: str = "train_loss") -> Values:
    """The first logged training loss over the final one: that of the last epoch, or "last_loss" (see `finals`)."""
    final = finals(data, label, metric)
    runs = [run for run in runs_of(data, label) if run["loss"] and run["seed"] in final]
    return {run["seed"]: quotient(run["loss"][0][1], final[run["seed"]]) for run in runs}


def quotient(above: float, below: float) -> float:
    """above / below; by 0 it is infinite, or not a number."""
    return above / below if below else math.inf if above else math.nan


def converged(data: Data, label: str, below: float) -> Values:
    """1 where a run ended with a training loss below the number given, 0 where it diverged or did not.

    A run that failed (a full disk) says nothing.
    """
    found = {}
    for run in runs_of(data, label):
        if run["status"] != "failed":
            loss = final_metric(run, "train_loss") if run["status"] == "done" else None
            found[run["seed"]] = float(loss is not None and loss < below)
    if not found:
        raise Missing(f"every run {label!r} failed")
    return found


def collapse(data: Data, label: str, quantity: str) -> Values:
    """Decades by which the first layer's value fell from the first probed step to the last."""
    found = {}
    for run in ended_runs(data, label):
        first, last = (float(rows_of(run, quantity, at)[0, 0]) for at in ("start", "end"))
        if not np.isfinite(first) or np.isnan(last):  # a last value of 0 is a collapse
            raise Missing(f"{label}, seed {run['seed']}: {quantity} of the first layer is not finite")
        found[run["seed"]] = first - last
    return found
