"""Pictures of conditioning records: what to look at instead of numbers.

Drawn through matplotlib's object interface on an Agg canvas, so that a user's own backend and figures
are left alone, and in matplotlib's default style, whatever the user's is. Colours are viridis and Okabe-Ito's,
which print and colour-blind readers can tell apart; a value that is not known (under the noise floor) is grey and
hatched, never a colour.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from condzoo.probe.conditioning import Conditioning
from condzoo.probe.depth_plots import draw_units, marked, widened
from condzoo.probe.files import expanded
from condzoo.probe.heatmaps import (
    DOMINATION,
    Panel,
    draw_heatmap,
    panels,
    places,
    value_range,
    write_iterations,
)
from condzoo.probe.layer_order import last_inputs
from condzoo.probe.picture_style import (
    ENTRY,
    LABEL,
    as_written,
    headed,
    legend_columns,
    run_style,
    save,
    shortened,
    usual_style,
    wrapped,
)
from condzoo.probe.records import Records, loaded

MAP, LINES = 2.1, 3.0  # inches of height that a heat map, and the lines below, have
CELL, ROOM = (2.3, 4.6), 15.0  # of width that a run's heat maps have, and those of several in all, where they can
NAMES = 1.2  # that names of layers take


def plot_records(records: Records, png: str | Path, title: str | None = None) -> None:
    """Layer-by-iteration heat maps of one run, its last layer's input as lines, its units by depth at the end.

    Args:
        records: a `conditioning.jsonl`, its run directory, one measurement, or several.
        png: the picture (also .pdf, .svg).
        title: above it; None for the path's folder.

    Raises:
        ValueError: there is no record, or no layer in it.
        TypeError: what is no measurement.
    """
    runs = {title or _label(records): _with_a_layer(records)}
    _comparison(runs, expanded(png), title or as_written(_label(records)))


def plot_comparison(runs: Mapping[str, Records], png: str | Path, title: str | None = None) -> None:
    """The heat maps of several runs side by side on common colours, their last layers and units in one axes.

    Args:
        runs: label to `conditioning.jsonl`, run directory, one measurement or several.
        png: the picture (also .pdf, .svg).
        title: above it.

    Raises:
        ValueError: no run, or a run without a record.
        TypeError: runs without labels; what is no measurement.
    """
    if not isinstance(runs, Mapping) or isinstance(runs, Conditioning):
        raise TypeError(
            f"runs must be a dict of label to run, got a {type(runs).__name__}; "
            "pass {'plain': 'runs/plain', 'bn': 'runs/bn'}, or one run to plot_records"
        )
    if not runs:
        raise ValueError("no run to plot; pass {label: path of a conditioning.jsonl}")
    _comparison({label: _with_a_layer(records) for label, records in runs.items()}, expanded(png), title)


@usual_style()
def _comparison(runs: dict[str, list[Conditioning]], png: Path, title: str | None) -> None:
    columns = len(runs)
    runs = dict(zip(shortened(list(map(str, runs)), LABEL), runs.values(), strict=True))
    rows = _rows(runs)
    named = _named(rows[0])
    cell = max(CELL[0], min(CELL[1], ROOM / columns))
    width = max(10.0, 1.2 + cell * columns + (NAMES * (sum(named) - 1) if columns > 2 else 0.0))
    inches = width / 3 - 0.7  # of one of the three axes below
    entries = legend_columns(runs, inches) if columns > 1 else 0
    heights = [MAP * len(rows), LINES + (ENTRY / 72 * math.ceil(columns / entries) if entries else 0.0)]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(wrapped(title), fontsize=14)
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    maps, lines = parts
    every = (width - 1.2 - NAMES * sum(named)) / columns - 0.2
    _heat_maps(maps, rows, [textwrap.fill(label, int(11 * cell)) for label in runs], every)
    below = lines.subplots(1, 3)
    _last_layers(below[:2], runs, entries, inches)
    last = {label if columns > 1 else "": _with_layers(records)[-1] for label, records in runs.items()}
    draw_units(below[2], {label: record.neurons for label, record in last.items()})
    # a run that diverged goes on with records of NaN alone, in which no unit is dying or full
    measured = all(len(records[-1]) for records in runs.values())
    which = " last record" if measured else "\nlast record with a layer"
    below[2].set_title(f"ReLU units by depth,{which}", fontsize=10)
    below[2].spines[["top", "right"]].set_visible(False)
    save(figure, png)


def _rows(runs: Mapping[str, list[Conditioning]]) -> list[tuple[Panel, ...]]:
    """The heat maps, a row a quantity: that of weights where one of the runs recorded them."""
    rows = list(zip(*(panels(records) for records in runs.values()), strict=True))
    return [row for row in rows if row[0].quantity != DOMINATION or any(panel.known for panel in row)]


def _named(same: Sequence[Panel]) -> list[bool]:
    """At which columns the layers' names stand: not at one of many that has the first one's layers."""
    return [i == 0 or len(same) <= 2 or panel.layers != same[0].layers for i, panel in enumerate(same)]


def _heat_maps(maps: SubFigure, rows: Sequence[tuple[Panel, ...]], labels: Sequence[str], inches: float) -> None:
    axes = maps.subplots(len(rows), len(labels), squeeze=False, sharex="col")
    for row, same in zip(axes, rows, strict=True):
        low, high, extend = value_range(same)
        for ax, panel, names in zip(row, same, _named(same), strict=True):
            mesh = draw_heatmap(ax, panel, Normalize(low, high), names=names, inches=inches)
        bar = maps.colorbar(mesh, ax=row.tolist(), aspect=12, pad=0.01, extend=extend)
        bar.ax.tick_params(labelsize=8)
        bar.set_label(same[0].quantity, fontsize=9)
    below = "\n" * max(ax.get_title(loc="left").count("\n") + 1 for ax in axes[0])
    for label, top, bottom in zip(labels, axes[0], axes[-1], strict=True):
        if len(labels) > 1:
            top.set_title(as_written(label) + below, fontsize=10)
        bottom.set_xlabel("iteration")


def _last_layers(axes: np.ndarray, runs: dict[str, list[Conditioning]], entries: int, inches: float) -> None:
    """The last layer's input over time, a line a run, in a legend of so many entries a line (0: of one run none)."""
    along = {label: places(records) for label, records in runs.items()}
    for i, (label, records) in enumerate(runs.items()):
        steps, inputs = along[label], last_inputs(records)
        style: dict[str, Any] = {**run_style(i), "markersize": 4, "label": as_written(label) if entries else None}
        sizes = np.array([np.nan if x is None else x.lambda_max or np.nan for x in inputs])
        kappas = np.array([np.nan if x is None else x.condition_number(0.5) for x in inputs])
        for ax, values in zip(axes, (sizes, kappas), strict=True):
            known = np.where(np.isfinite(values), values, np.nan)
            ax.plot(steps, known, markevery=marked(known), **style)
            # also where nothing is known, or, of a run that diverged, nothing was measured
            ax.update_datalim([(steps[0], 1), (steps[-1], 1)], updatey=False)
    for ax, what, none in zip(
        axes, (r"$\lambda_{max}$", r"$\kappa_{50\%}$"), ("all are 0", "none is known"), strict=True
    ):
        ax.set_yscale("log")
        widened(ax)
        empty = not any(np.isfinite(line.get_ydata()).any() for line in ax.get_lines())
        headed(ax, f"Input of the last layer, {what}" + f": {none}" * empty, entries)
        ax.set_xlabel("iteration")
        write_iterations(ax, [min(s[0] for s in along.values()), max(s[-1] for s in along.values())], inches, 10.0)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


def _with_layers(records: Sequence[Conditioning]) -> list[Conditioning]:
    return [record for record in records if len(record)]


def _with_a_layer(records: Records) -> list[Conditioning]:
    several = loaded(records)
    if not any(len(record) for record in several):
        place = f" in {records}" if isinstance(records, (str, Path)) else ""
        raise ValueError(f"no record with a measured layer to plot{place}; was the run probed (probe.every > 0)?")
    return several


def _label(records: Records) -> str:
    if not isinstance(records, (str, Path)):
        return "run"
    path = Path(os.path.abspath(records))  # "." has no name
    return path.parent.name if path.suffix == ".jsonl" else path.name
