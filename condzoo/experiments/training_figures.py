"""Figures of trainings by layer and iteration, and what all figures of trainings share."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, NullFormatter

from condzoo.experiments.loading import planned_runs
from condzoo.experiments.schema import Experiment
from condzoo.probe.picture_style import MARKERS, OKABE_ITO, run_style

NAMES = {
    "input_lambda_max": r"$\lambda_{max}(\Sigma_x)$",
    "grad_lambda_max": r"$\lambda_{max}(\Sigma_{\nabla h})$",
    "fisher_lambda_max": r"$\lambda_{max}(\Sigma_x)\,\lambda_{max}(\Sigma_{\nabla h})$",
    "weight_domination": r"$\sigma_{max}(\partial L/\partial W)\,/\,\sigma_{max}(W)$",
    "dying": "share of dying units",
    "full": "share of full units",
    "loss": "training loss",
    "train_loss": "training loss",
    "train_error": "training error, %",
    "test_error": "test error, %",
}
COLOURS = "viridis"


def name_of(quantity: str) -> str:
    """What stands at an axis."""
    if "_kappa" in quantity:
        side, percent = quantity.split("_kappa")
        moment = {"input": "x", "grad": r"\nabla h"}[side]
        return rf"$\kappa_{{{percent}\%}}(\Sigma_{{{moment}}})$"
    return NAMES[quantity]


def labels_of(data: dict[str, Any]) -> list[str]:
    """The curves, in their order."""
    return list(dict.fromkeys(run["label"] for run in data["runs"]))


def chosen_runs(data: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """The drawn runs of one curve, a seed each (or a point of a grid each)."""
    return [run for run in data["runs"] if run["label"] == label and run["chosen"]]


def layers(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """A row a curve: each layer's value over the iterations, colour by depth (one seed); the loss of all seeds."""
    labels, quantities = labels_of(data), experiment.figure.quantities
    columns = [*quantities, "loss"]
    epoch = steps_an_epoch(experiment, data)
    figure.set_size_inches(3.0 * len(columns) + 0.8, 2.1 * len(labels) + 1.1)
    share = "row" if epoch is None else False
    axes = figure.subplots(len(labels), len(columns), squeeze=False, sharex=share, sharey="col")
    for row, label in enumerate(labels):
        runs = chosen_runs(data, label)
        for column, quantity in enumerate(quantities):
            draw_layers(axes[row, column], longest(runs), quantity)
        draw_losses(axes[row, -1], runs, epoch)
        for column, quantity in enumerate(columns):
            axes[row, column].set_title(name_of(quantity) if row == 0 else "", fontsize=10)
        axes[row, 0].set_ylabel(title_of(label, runs), fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("iteration", fontsize=8)
    axes[-1, -1].set_xlabel(time_name(epoch), fontsize=8)
    for ax in axes[:, -1]:
        plain_numbers(ax)
    depth = ScalarMappable(Normalize(0, 1), colormaps[COLOURS])
    bar = figure.colorbar(depth, ax=axes[:, :-1].ravel().tolist(), aspect=30, pad=0.01, ticks=[])
    bar.ax.set_title("last\nlayer", fontsize=7)
    bar.ax.set_xlabel("first\nlayer", fontsize=7)


def steps_an_epoch(experiment: Experiment, data: dict[str, Any]) -> int | None:
    """By how many iterations losses and errors are divided: drawn by epoch; None where they are by iteration.

    The last incomplete batch is dropped, as the loop drops it.
    """
    images = experiment.figure.epoch_images
    if images is None:
        return None
    return images // planned_runs(experiment, data["scale"])[0].recipe.data.batch_size


def time_name(epoch: int | None) -> str:
    """What stands at the axis of time."""
    return "iteration" if epoch is None else "epoch"


def longest(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run whose layers are drawn: the first of those that were probed at the most steps."""
    return max(runs, key=lambda run: len(run["probed"]))


def title_of(label: str, runs: Sequence[dict[str, Any]]) -> str:
    """A curve's label with the point of its grid that was chosen, how many seeds had no end, and which one is drawn."""
    variant = ", ".join(f"{field.split('.')[-1]} {value:g}" for field, value in runs[0]["variant"].items())
    drawn = f"layers: seed {longest(runs)['seed']}" if len(runs) > 1 else ""
    return "\n".join(line for line in (label, variant, fates(runs), drawn) if line)


def fates(runs: Sequence[dict[str, Any]]) -> str:
    """How many runs of a curve diverged or failed, in words; empty where none did."""
    counts = {fate: sum(run["status"] == fate for run in runs) for fate in ("diverged", "failed")}
    return ", ".join(f"{count} of {len(runs)} {fate}" for fate, count in counts.items() if count)


def named(label: str, runs: Sequence[dict[str, Any]]) -> str:
    """A curve's label in a legend, with what became of the seeds that did not end."""
    found = fates(runs)
    return f"{label} ({'x: ' * ('diverged' in found)}{found})" if found else label


def cross_where_diverged(
    ax: Axes, run: dict[str, Any], times: Iterable[float], values: Iterable[float | None], color: str
) -> None:
    """Mark the last known value of a run that diverged; nothing of others, or where none is known."""
    known = [(t, v) for t, v in zip(times, values, strict=True) if v is not None and np.isfinite(v)]
    if run["status"] == "diverged" and known:
        ax.plot(*known[-1], "x", color=color)


def draw_layers(ax: Axes, run: dict[str, Any], quantity: str) -> None:
    """One line a layer over the probed steps; gaps where a value is not known."""
    kept = run["quantities"].get(quantity)
    values = np.array(kept["values"], dtype=float) if kept and kept["values"] else np.empty((0, 0))
    count = values.shape[1] if values.size else 0
    logarithmic = "lambda" in quantity or "kappa" in quantity or "weight" in quantity
    for layer in range(count):
        line = values[:, layer]
        shown = np.where(line > 0, line, np.nan) if logarithmic else line
        marker = "." if len(shown) == 1 else None  # a line through one point is not seen
        ax.plot(run["probed"], shown, marker=marker, color=colormaps[COLOURS](layer / max(1, count - 1)), lw=0.9)
    if logarithmic:
        ax.set_yscale("log")
    tidy(ax)
    if not count:
        ax.text(0.5, 0.5, f"not measured ({run['status']})", transform=ax.transAxes, ha="center", fontsize=8)


def draw_losses(ax: Axes, runs: Sequence[dict[str, Any]], epoch: int | None = None) -> None:
    """The training loss of every seed, by epoch where it has so many iterations; a cross where a run diverged."""
    for i, run in enumerate(runs):
        if run["loss"]:
            steps = [step / (epoch or 1) for step, _ in run["loss"]]
            losses = [loss for _, loss in run["loss"]]
            shown = np.array([np.nan if loss is None else loss for loss in losses], dtype=float)
            style = run_style(i) | {"marker": None}
            label = f"seed {run['seed']}" + " (x: diverged)" * (run["status"] == "diverged")
            ax.plot(steps, shown, **style, lw=0.9, label=label)
            cross_where_diverged(ax, run, steps, losses, style["color"])
    ax.set_yscale("log")
    tidy(ax)
    if len(runs) > 1:
        ax.legend(fontsize=6, frameon=False)


def tidy(ax: Axes) -> None:
    """Small ticks, a light grid."""
    ax.tick_params(which="both", labelsize=7)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def plain_numbers(ax: Axes) -> None:
    """1.6 and 2 in place of powers of ten on a logarithmic axis; between the powers only where there are few."""
    low, high = ax.get_ylim()
    number = FuncFormatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(number)
    ax.yaxis.set_minor_formatter(number if high < 10 * low else NullFormatter())


def explosion(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """A column a curve: lambda_max over the layers, one line an iteration, of the seed that went farthest."""
    labels = labels_of(data)
    quantity = experiment.figure.quantities[0]
    figure.set_size_inches(4.6 * len(labels) + 0.6, 4.4)
    axes = figure.subplots(1, len(labels), squeeze=False)
    for ax, label in zip(axes[0], labels, strict=True):
        runs = chosen_runs(data, label)
        run = longest(runs)
        table = run["quantities"].get(quantity, {"values": []})
        if not table["values"]:
            ax.text(0.5, 0.5, f"not measured ({run['status']})", transform=ax.transAxes, ha="center", fontsize=8)
        for i, (step, values) in enumerate(zip(run["probed"], table["values"], strict=True)):
            color = colormaps[COLOURS](i / max(1, len(run["probed"]) - 1) * 0.9)
            ax.plot(np.array(values, dtype=float), color=color, lw=1.1, label=f"iteration {step}")
        ax.set(yscale="log", xlabel="layer, from the input", title=title_of(label, runs))
        tidy(ax)
    axes[0, 0].set_ylabel(name_of(quantity))
    drawn = [ax for ax in axes[0] if ax.lines]
    if drawn:
        drawn[-1].legend(fontsize=7, frameon=False)


def last_layer(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """A panel a quantity: the last layer's value over the iterations, a line a seed, a cross where it diverged."""
    quantities = experiment.figure.quantities
    figure.set_size_inches(4.4 * (len(quantities) + 1) + 0.4, 4.2)
    axes = figure.subplots(1, len(quantities) + 1, squeeze=False)[0]
    for i, label in enumerate(labels_of(data)):
        runs, color = chosen_runs(data, label), OKABE_ITO[i % len(OKABE_ITO)]
        for j, run in enumerate(runs):
            style: dict[str, Any] = {"color": color, "lw": 1.2} | ({"label": named(label, runs)} if j == 0 else {})
            marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 3}
            for ax, quantity in zip(axes, quantities, strict=False):
                rows = run["quantities"].get(quantity, {"values": []})["values"]
                values = np.array([row[-1] for row in rows], dtype=float)
                ax.plot(run["probed"], values, **style, **marker)
                cross_where_diverged(ax, run, run["probed"], values, color)
            losses = np.array([loss for _, loss in run["loss"]], dtype=float)
            steps = [step for step, _ in run["loss"]]
            axes[-1].plot(steps, losses, **style)
            cross_where_diverged(axes[-1], run, steps, losses, color)
    for ax, quantity in zip(axes, [*quantities, "loss"], strict=True):
        ax.set(yscale="log", xlabel="iteration", title=name_of(quantity))
        tidy(ax)
    axes[0].legend(fontsize=8, frameon=False)
