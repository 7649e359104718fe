"""Layer-by-iteration heat maps of log10 lambda_max, log10 kappa and log10 of the weight domination."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import MaxNLocator

from condzoo.probe.conditioning import Conditioning, LayerConditioning
from condzoo.probe.layer_order import forward_order
from condzoo.probe.picture_style import NAME, as_written, shortened
from condzoo.probe.spectra import Spectrum

NAMES = 10  # layer names written at an axis at most
STEPS = 8  # parts at most into which round iterations divide an axis
NARROW = 2.9  # inches, in which a title and its notes have no room beside each other
LAST = 0.05  # of the height is the last layer's at least
UNKNOWN = {"facecolor": "0.95", "edgecolor": "0.6", "hatch": "////"}  # in print in grey a plain one is viridis's end

QUANTITIES = (
    ("input", None, r"$\log_{10}\,\lambda_{max}$ of the inputs"),
    ("input", 0.5, r"$\log_{10}\,\kappa_{50\%}$ of the inputs"),
    ("output_grad", None, r"$\log_{10}\,\lambda_{max}$ of the gradients"),
    ("output_grad", 0.5, r"$\log_{10}\,\kappa_{50\%}$ of the gradients"),
)
DOMINATION = r"weight domination $\log_{10}\,dW/W$"


@dataclass(frozen=True, eq=False)
class Panel:
    """One heat map: values [layers, records], NaN where not known, -inf for a moment of zeros."""

    quantity: str
    layers: list[str]
    steps: list[int]
    values: np.ndarray

    @property
    def known(self) -> bool:
        """Whether there is any value, be it a zero."""
        return not np.isnan(self.values).all()


def panels(records: Sequence[Conditioning]) -> list[Panel]:
    """The five heat maps of a run: magnitude and condition of inputs and of output gradients, weight domination.

    The last, the table's dW/W, is all NaN where no weights were recorded.
    """
    layers = forward_order(records)
    steps = places(records)
    logs: dict[str, Callable[[LayerConditioning], float]] = {
        quantity: partial(_log10_of, side, p) for side, p, quantity in QUANTITIES
    }
    logs[DOMINATION] = _log10_domination
    found = []
    for quantity, log in logs.items():
        values = np.full((len(layers), len(records)), np.nan)
        for j, record in enumerate(records):
            for i, name in enumerate(layers):
                if name in record:
                    values[i, j] = log(record[name])
        found.append(Panel(quantity, layers, steps, values))
    return found


def places(records: Sequence[Conditioning]) -> list[int]:
    """Where each record stands along the iterations: at its step, or, where these do not rise, one beside the other.

    Measurements at rest have none, and at one place nothing of them would be seen.
    """
    steps = [record.step or 0 for record in records]
    rising = all(a < b for a, b in itertools.pairwise(steps))
    return steps if rising else list(range(len(records)))


def _log10_of(side: str, p: float | None, layer: LayerConditioning) -> float:
    s: Spectrum = getattr(layer, side)
    return _log10(s.lambda_max if p is None else s.condition_number(p))


def _log10_domination(layer: LayerConditioning) -> float:
    ratio = None if layer.frozen else layer.weight_domination
    return math.nan if ratio is None else _log10(ratio)


def _log10(value: float) -> float:
    if value == 0:
        return -math.inf
    return math.log10(value) if 0 < value < math.inf else math.nan


def value_range(same: Sequence[Panel]) -> tuple[float, float, str]:
    """The common colour range of one quantity over runs, and at which ends of it ("min") values lie beyond.

    All that is known, at least one decade, but for what is further from the bulk (90 %) than that is wide: gradients
    that vanish to 1e-50 in one record would leave all others one colour. The last layers are within, always.
    """
    known = np.concatenate([panel.values[np.isfinite(panel.values)] for panel in same])
    if not known.size:
        return 0.0, 1.0, "neither"
    low, high = float(known.min()), float(known.max())
    if high - low < 1:
        return (low + high - 1) / 2, (low + high + 1) / 2, "neither"
    last = np.concatenate([panel.values[-1][np.isfinite(panel.values[-1])] for panel in same])
    least, most = np.quantile(known, (0.05, 0.95))
    width = max(1.0, most - least)
    within = [least - width, most + width, *last]
    below, above = low < min(within), high > max(within)
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
    return max(low, float(min(within))), min(high, float(max(within))), beyond


def draw_heatmap(ax: Axes, panel: Panel, norm: Normalize, *, names: bool, inches: float) -> QuadMesh:
    """Draw one panel, about so wide: layers downwards from the first, by name or by place, iterations to the right."""
    count = len(panel.layers)
    rows = np.arange(count + 1) - 0.5
    rows[-1] = rows[-2] + max(1.0, (count - 1) * LAST / (1 - LAST))  # not lost under the line beside it, or the frame
    mesh = ax.pcolormesh(_edges(panel.steps), rows, np.ma.masked_invalid(panel.values), cmap="viridis", norm=norm)
    zeros = np.isneginf(panel.values)
    if zeros.any():  # under all that the colours show: no signal, or no gradient, arrives there
        black = np.ma.masked_where(~zeros, np.zeros(zeros.shape))
        ax.pcolormesh(_edges(panel.steps), rows, black, cmap=ListedColormap(["black"]))
    ax.patch.set(**UNKNOWN)
    ax.invert_yaxis()
    ax.axhline(count - 1.5, color="white", lw=1.2)  # the last layer stands apart
    shown = list(range(count - 1, -1, -math.ceil(count / NAMES)))  # evenly, the last layer always
    written = shortened([name or "(model)" for name in panel.layers], NAME) if names else list(map(str, range(count)))
    ax.set_yticks((rows[:-1] + rows[1:])[shown] / 2, [as_written(written[i]) for i in shown])
    ax.tick_params(labelsize=7.5)
    write_iterations(ax, panel.steps, inches, 7.5)
    narrow = inches < NARROW
    seen = {"black: 0": zeros.any(), "grey, hatched: not known": np.isnan(panel.values).any()}
    notes = "; ".join(what.removeprefix("grey, " * narrow) for what, there in seen.items() if there)
    note = ("\n" if narrow else "  ") + f"({notes})" if notes else ""
    ax.set_title(_plain(panel.quantity) + note, fontsize=8 if narrow else 9, loc="left")
    return mesh


def write_iterations(ax: Axes, steps: Sequence[int], inches: float, points: float) -> None:
    """Round iterations at an x axis of about this length, in letters of this size, as many as have room.

    Round, as the steps themselves may lie close together. One may be enough: of one measurement parts of an iteration
    would be counted.
    """
    room = int(72 * inches / (points * (0.64 * len(str(steps[-1])) + 1.2)))
    ticks = MaxNLocator(max(1, min(STEPS, room)), integer=True, min_n_ticks=1).tick_values(steps[0], steps[-1])
    ax.set_xticks([tick for tick in ticks if steps[0] <= tick <= steps[-1]])
    ax.ticklabel_format(axis="x", style="plain", useOffset=False)


def _plain(quantity: str) -> str:
    return quantity.replace(r"\log_{10}\,", "")


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Cell borders midway between the steps measured."""
    middle = np.asarray(steps, dtype=float)
    if middle.size == 1:
        return np.array([middle[0] - 0.5, middle[0] + 0.5])
    inner = (middle[1:] + middle[:-1]) / 2
    return np.concatenate([[2 * middle[0] - inner[0]], inner, [2 * middle[-1] - inner[-1]]])
