"""One measurement as a picture: magnitude, condition, spectra, units and weights by depth, the last layer by itself.

Colours are Okabe-Ito's and viridis; every line also has a marker or a dash of its own, for print in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from condzoo.probe.conditioning import Conditioning
from condzoo.probe.neurons import Neurons
from condzoo.probe.picture_style import FILLS, NAME, OKABE_ITO, as_written, headed, save, shortened, usual_style
from condzoo.probe.spectra import Spectrum

SIDES = (("input", OKABE_ITO[0], "o", "inputs x"), ("output_grad", OKABE_ITO[1], "s", "output gradients g"))
LAST = OKABE_ITO[3]
MARKS = 20  # markers a line, about


@usual_style()
def plot_conditioning(conditioning: Conditioning, path: Path) -> None:
    """One measurement: magnitude, condition, spectra, units and weights by depth, and the last layer's spectra.

    Raises:
        ValueError: no layer was measured.
        OSError: the picture cannot be written; names the file.
    """
    if not len(conditioning):
        raise ValueError("nothing to plot: no layer was measured; see .skipped for the reasons")
    figure = Figure(figsize=(11.5, 15), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 2)
    _magnitudes(axes[0, 0], conditioning)
    _conditions(axes[0, 1], conditioning)
    for ax, (side, *_, label) in zip(axes[1], SIDES, strict=True):
        _spectra(ax, [getattr(layer, side) for layer in conditioning.values()], f"Spectra of the {label}")
    draw_units(axes[2, 0], {"": conditioning.neurons})
    _last_layer(axes[2, 1], conditioning)
    _weights(axes[3, 0], conditioning)
    _domination(axes[3, 1], conditioning)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_units(ax: Axes, runs: Mapping[str, Mapping[str, Neurons]]) -> None:
    """Shares of dying (solid) and full (dashed) units by depth, a colour a run, and other markers where it repeats.

    Of up to seven runs the legend names these two alone: whose colour is whose stands in the axes beside this one.
    """
    ax.set_title("ReLU units by depth", fontsize=10)
    most = max((len(neurons) for neurons in runs.values()), default=0)
    if not most:
        ax.text(0.5, 0.5, "no ReLU measured", ha="center", va="center", color="0.4", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[])
        return
    for i, (label, neurons) in enumerate(runs.items()):
        depth = np.arange(len(neurons))
        for what, dash, marker, color in (("dying", "-", "v", i), ("full", "--", "^", i + (len(runs) == 1))):
            shares = [getattr(n, f"{what}_share") for n in neurons.values()]
            style: dict[str, Any] = {"color": OKABE_ITO[color % len(OKABE_ITO)], "ls": dash, "lw": 1.4}
            style["fillstyle"] = FILLS[i // len(OKABE_ITO) % len(FILLS)]
            name = f"{as_written(label)}, {what}" if label else what
            ax.plot(depth, shares, marker=marker, ms=5, markevery=spaced(most), label=name, **style)
    largest = max(
        (max(n.dying_share, n.full_share) for neurons in runs.values() for n in neurons.values()), default=0.0
    )
    top = max(0.1, 1.1 * largest)
    ax.set(xlabel="ReLU, in forward order", ylim=(-0.03 * top, 1.2 * min(top, 1.03)))  # the legend is above the lines
    ax.set_yticks([share for share in ax.get_yticks() if -0.001 < share < 1.001])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    if len(runs) > len(OKABE_ITO):  # beside the lines, of which there are too many for a place among them
        ax.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, ncols=math.ceil(len(runs) / 6)
        )
        return
    marks: list[Artist] = list(ax.get_lines()[:2])
    if len(runs) > 1:
        marks = [Line2D([], [], color="0.4", ls=ls, marker=marker, ms=5) for ls, marker in (("-", "v"), ("--", "^"))]
    ax.legend(marks, ["dying", "full"], loc="upper center", ncols=2, fontsize=8, frameon=False)


def _magnitudes(ax: Axes, conditioning: Conditioning) -> None:
    known = False
    for side, color, marker, label in SIDES:
        sizes = [getattr(c, side).lambda_max or np.nan for c in conditioning.values()]
        known |= bool(np.isfinite(sizes).any())
        _by_depth(ax, sizes, color, marker, "-", label)
    title = r"Largest eigenvalue $\lambda_{max}$"
    _finish_depth(ax, f"{title} by depth" if known else f"{title}: all are 0", conditioning)


def _conditions(ax: Axes, conditioning: Conditioning) -> None:
    known = False
    for side, color, marker, label in SIDES:
        for p, dash in ((0.5, "-"), (1.0, ":")):
            kappas = np.array([getattr(c, side).condition_number(p) for c in conditioning.values()])
            known |= bool(np.isfinite(kappas).any())
            name = rf"{label.removeprefix('output ')}, $\kappa_{{{100 * p:g}\%}}$"
            _by_depth(ax, np.where(np.isfinite(kappas), kappas, np.nan), color, marker, dash, name, hollow=p == 1.0)
    title = r"Condition number $\kappa_p$ by depth (missing: not known)"
    _finish_depth(ax, title if known else r"Condition number $\kappa_p$: none is known", conditioning)


def spaced(points: int) -> int:
    """Every which point of a line has a marker."""
    return max(1, points // MARKS)


def marked(values: np.ndarray) -> np.ndarray:
    """Where a line has markers: evenly, and at values between unknown ones, of which no line would be seen."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    return alone | (np.arange(len(values)) % spaced(len(values)) == 0)


def widened(ax: Axes, decades: float = 2.2) -> None:
    """A logarithmic y axis over so many decades at least, so that small changes look small."""
    low, high = np.log10(ax.get_ylim())
    if 0 < high - low < decades:
        middle = (low + high) / 2
        ax.set_ylim(10 ** (middle - decades / 2), 10 ** (middle + decades / 2))


def _by_depth(ax: Axes, values: Any, color: str, marker: str, dash: str, label: str, *, hollow: bool = False) -> None:
    depth = np.arange(len(values))
    style: dict[str, Any] = {"marker": marker, "ms": 4.5, "mfc": "white" if hollow else color, "lw": 1.4}
    ax.plot(depth, values, color=color, ls=dash, markevery=marked(np.asarray(values)), label=label, **style)
    ax.plot(depth[-1:], values[-1:], color=color, marker=marker, ms=9, mfc="none", mew=1.6, ls="none")


def _finish_depth(ax: Axes, title: str, conditioning: Conditioning) -> None:
    ax.set(yscale="log", xlabel=f"layer, in forward order (ringed: the last, {_last_name(conditioning)})")
    beside = 0.05 * (len(conditioning) - 1) or 0.5
    ax.set_xlim(-beside, len(conditioning) - 1 + beside)  # all layers, also where little is known
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    widened(ax)
    ax.grid(alpha=0.3)
    headed(ax, title)


def _last_name(conditioning: Conditioning) -> str:
    return as_written(shortened(list(conditioning), NAME)[-1] or "(model)")


def _spectra(ax: Axes, spectra: Sequence[Spectrum], title: str) -> None:
    """Eigenvalues over lambda_max against their place, first layers dark and later ones light."""
    for i, s in enumerate(spectra):
        last = i == len(spectra) - 1
        if not s.rank or not s.lambda_max:
            continue
        known = s.eigenvalues[: s.rank].numpy() / s.lambda_max
        style: dict[str, Any] = {"color": colormaps["viridis"](0.9 * i / max(1, len(spectra) - 1)), "lw": 1, "ls": "-"}
        if last:
            style = {"color": LAST, "lw": 2.4, "ls": "--", "label": "last layer"}
        ax.plot((np.arange(len(known)) + 1) / s.dim, known, marker="." if len(known) < 4 else None, **style)
    ax.set(yscale="log", xlim=(0, 1.02), xlabel="place in the spectrum, of d", ylabel=r"$\lambda / \lambda_{max}$")
    ax.grid(alpha=0.3)
    widened(ax)
    headed(ax, title + (" (dark: first layers)" if ax.get_lines() else ": none is known"))


def _last_layer(ax: Axes, conditioning: Conditioning) -> None:
    """The last layer's two spectra as they are, with their noise floors."""
    layer, known = conditioning.last, False
    for (side, color, marker, label), dash, name in zip(SIDES, (":", "-."), "xg", strict=True):
        s: Spectrum = getattr(layer, side)
        values = s.eigenvalues[: s.rank].numpy()
        known |= bool((values > 0).any())
        style: dict[str, Any] = {"marker": marker, "ms": 4.5, "markevery": spaced(len(values)), "lw": 1.4}
        ax.plot(np.arange(len(values)) + 1, values, color=color, label=label, **style)
        if s.noise_floor > 0:
            ax.axhline(s.noise_floor, color=color, lw=1.2, ls=dash, label=f"noise floor of {name}")
    ax.set(yscale="log", xlabel="eigenvalue, largest first", ylabel=r"$\lambda$")
    what = "" if known else " (no eigenvalue is known)"
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    headed(ax, f"Last layer, {_last_name(conditioning)}{what}")


def _weights(ax: Axes, conditioning: Conditioning) -> None:
    sizes = [[c.weight or np.nan, c.weight_grad or np.nan] for c in conditioning.values()]
    for values, color, marker, label in zip(
        np.array(sizes).T, OKABE_ITO, "os", ("weight W", "its gradient dL/dW"), strict=False
    ):
        _by_depth(ax, values, color, marker, "-", label)
    known = "" if np.isfinite(sizes).any() else ": none is known"
    ax.set_ylabel(r"$\sigma_{max}$")
    _finish_depth(ax, r"Weights, largest singular value $\sigma_{max}$ by depth" + known, conditioning)


def _domination(ax: Axes, conditioning: Conditioning) -> None:
    """The table's dW/W: where it is small the weight dominates, and the layer hardly moves."""
    ratios = np.array([np.nan if c.frozen else c.weight_domination or np.nan for c in conditioning.values()])
    _by_depth(ax, ratios, OKABE_ITO[2], "D", "-", "")
    known = "" if np.isfinite(ratios).any() else ": none is known"
    ax.set_ylabel(r"$\sigma_{max}(dL/dW)\,/\,\sigma_{max}(W)$")
    _finish_depth(ax, "Weight domination by depth, dW/W" + known, conditioning)
