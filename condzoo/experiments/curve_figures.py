"""Figures of how trainings end: losses and errors by epoch, and test errors by network."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from condzoo.experiments.schema import Experiment
from condzoo.experiments.training_figures import (
    MARKERS,
    chosen_runs,
    cross_where_diverged,
    fates,
    labels_of,
    name_of,
    named,
    plain_numbers,
    steps_an_epoch,
    tidy,
    time_name,
)
from condzoo.probe.picture_style import OKABE_ITO

MARKED = 40  # points a curve, above which they are a line without markers


def curves(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """A panel a metric at each epoch's end, a line a curve: median and range of the seeds that ended."""
    columns = experiment.figure.columns
    epoch = steps_an_epoch(experiment, data)
    figure.set_size_inches(4.2 * len(columns) + 0.4, 4.2)
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for ax, column in zip(axes, columns, strict=True):
        for i, label in enumerate(labels_of(data)):
            draw_curve(ax, chosen_runs(data, label), column, i, label, epoch)
        ax.set(xlabel=time_name(epoch), title=name_of(column))
        if column == "train_loss":
            ax.set_yscale("log")
            plain_numbers(ax)
        tidy(ax)
    axes[-1].legend(fontsize=7, frameon=False)


def draw_curve(
    ax: Axes, runs: Sequence[dict[str, Any]], column: str, index: int, label: str, epoch: int | None = None
) -> None:
    """The median of one metric over the seeds that ended, with its range; of a run within an epoch the loss as logged.

    A seed that diverged is a cross at its last value, and counted in the label: at its own last step there is no other
    seed, and no median.
    """
    points = points_of(runs, column)
    ended = [points[run["seed"]] for run in runs if run["status"] == "done"]
    steps = sorted({step for row in ended for step in row})
    found = [[row[step] for row in ended if step in row] for step in steps]
    times = [step / (epoch or 1) for step in steps]
    marker = MARKERS[index % len(MARKERS)] if len(steps) < MARKED else None
    color = OKABE_ITO[index % len(OKABE_ITO)]
    medians = [np.median(values) for values in found]
    ax.plot(times, medians, label=named(label, runs), lw=1.3, color=color, marker=marker, markersize=3)
    low, high = [min(v) for v in found], [max(v) for v in found]
    if len(steps) > 1:
        ax.fill_between(times, low, high, color=color, alpha=0.15, lw=0)
    elif steps:  # a band needs a width
        ax.vlines(times, low, high, color=color, alpha=0.4)
    for run in runs:
        own = sorted(points[run["seed"]].items())
        cross_where_diverged(ax, run, [step / (epoch or 1) for step, _ in own], [value for _, value in own], color)


def points_of(runs: Sequence[dict[str, Any]], column: str) -> dict[int, dict[int, float]]:
    """Seed -> step -> a metric at the epochs' ends, errors in %; the logged loss within an epoch."""
    factor = 100.0 if column.endswith("error") else 1.0
    rows = {
        run["seed"]: {e["step"]: factor * e[column] for e in run["epochs"] if e[column] is not None} for run in runs
    }
    if column != "train_loss":
        return rows
    short = all(len(row) < 2 for row in rows.values())
    return {run["seed"]: smoothed(run["loss"]) if short or not rows[run["seed"]] else rows[run["seed"]] for run in runs}


def smoothed(losses: Sequence[Sequence[Any]]) -> dict[int, float]:
    """Step -> the median of the nine logged losses around it, fewer at the ends."""
    known = [(int(step), float(loss)) for step, loss in losses if loss is not None]
    return {
        step: float(np.median([loss for _, loss in known[max(0, i - 4) : i + 5]])) for i, (step, _) in enumerate(known)
    }


def errors(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """Test error of each run at the end: a column a curve, a point a seed, a bar at the median; how many diverged."""
    labels = labels_of(data)
    figure.set_size_inches(max(8.0, 0.75 * len(labels) + 1.5), 4.8)
    ax = figure.subplots()
    for i, label in enumerate(labels):
        runs = chosen_runs(data, label)
        known = [100 * run["test_error"] for run in runs if run["test_error"] is not None]
        color = OKABE_ITO[i % 2]
        ax.plot([i] * len(known), known, MARKERS[i % 2], color=color, alpha=0.8)
        if known:
            ax.hlines(np.median(known), i - 0.25, i + 0.25, color=color)
        if text := fates(runs):
            above = ax.get_xaxis_transform()  # at the upper edge, wherever the errors lie
            ax.text(i, 0.98, text, transform=above, rotation=90, ha="center", va="top", fontsize=7, color=color)
    ax.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
    ax.set_ylabel(f"{name_of('test_error')}\n(points: seeds; bars: medians)")
    ax.set_xlim(-0.6, len(labels) - 0.4)
    tidy(ax)
