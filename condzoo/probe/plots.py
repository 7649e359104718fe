"""Pictures of conditioning records: what to look at instead of numbers.

Drawn through matplotlib's object interface on an Agg canvas, so that a user's own backend and figures
are left alone. Colours are viridis and Okabe-Ito's, which print and colour-blind readers can tell apart;
a value that is not known (under the noise floor) is grey, never a colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from condzoo.probe.conditioning import Conditioning
from condzoo.probe.heatmaps import OKABE_ITO, draw_heatmap, panels, value_range
from condzoo.probe.records import read_records
from condzoo.probe.spectra import Spectrum

Records = str | Path | Sequence[Conditioning]


def plot_records(records: Records, png: str | Path, title: str | None = None) -> None:
    """Layer-by-iteration heat maps of one run, and its last layer's input as lines.

    Args:
        records: a `conditioning.jsonl`, its run directory, or measurements.
        png: the picture (also .pdf, .svg).
        title: above it; None for the path's folder.

    Raises:
        ValueError: there is no record, or no layer in it.
    """
    runs = {title or _label(records): _loaded(records)}
    _comparison(runs, Path(png), title or _label(records))


def plot_comparison(runs: Mapping[str, Records], png: str | Path, title: str | None = None) -> None:
    """The heat maps of several runs side by side on common colours, and their last layers in one axes.

    Args:
        runs: label to `conditioning.jsonl`, run directory or measurements.
        png: the picture (also .pdf, .svg).
        title: above it.

    Raises:
        ValueError: no run, or a run without a record.
    """
    if not runs:
        raise ValueError("no run to plot; pass {label: path of a conditioning.jsonl}")
    _comparison({label: _loaded(records) for label, records in runs.items()}, Path(png), title)


def _comparison(runs: dict[str, list[Conditioning]], png: Path, title: str | None) -> None:
    columns = len(runs)
    figure = Figure(figsize=(max(9.0, 1.2 + 4.6 * columns), 11.5), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=14)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.2, 1.15])
    maps, lines = parts
    axes = maps.subplots(4, columns, squeeze=False, sharex="col")
    drawn = {label: panels(records) for label, records in runs.items()}
    for row in range(4):
        norm = Normalize(*value_range([drawn[label][row] for label in runs]))
        for column, label in enumerate(runs):
            mesh = draw_heatmap(axes[row, column], drawn[label][row], norm, names=column == 0 or columns <= 2)
        bar = maps.colorbar(mesh, ax=axes[row, :].tolist(), aspect=12, pad=0.01)
        bar.ax.tick_params(labelsize=8)
        bar.set_label(next(iter(drawn.values()))[row].quantity, fontsize=9)
    for column, label in enumerate(runs):
        if columns > 1:
            axes[0, column].set_title(f"{label}\n{axes[0, column].get_title()}", fontsize=10)
        axes[3, column].set_xlabel("iteration")
    _last_layers(lines.subplots(1, 2), runs)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=130)


def _last_layers(axes: np.ndarray, runs: dict[str, list[Conditioning]]) -> None:
    for i, (label, records) in enumerate(runs.items()):
        spectra = [list(r.values())[-1].input for r in records if len(r)]
        steps = [r.step or 0 for r in records if len(r)]
        style: dict[str, Any] = {
            "color": OKABE_ITO[i % len(OKABE_ITO)],
            "marker": "osD^v<>"[i % 7],
            "markersize": 4,
            "label": label,
        }
        axes[0].plot(steps, [s.lambda_max for s in spectra], **style)
        kappas = np.array([s.condition_number(0.5) for s in spectra])
        axes[1].plot(steps, np.where(np.isfinite(kappas), kappas, np.nan), **style)
    for ax, what in zip(
        axes, (r"largest eigenvalue $\lambda_{max}$", r"condition number $\kappa_{50\%}$"), strict=True
    ):
        ax.set_yscale("log")
        ax.set_title(f"Input of the last layer: {what}", fontsize=10)
        ax.set_xlabel("iteration")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1:
            ax.legend(fontsize=9, frameon=False)


def plot_conditioning(conditioning: Conditioning, path: Path) -> None:
    """One measurement: magnitude, condition and units by depth, and every layer's spectra."""
    if not len(conditioning):
        raise ValueError("nothing to plot: no layer was measured; see .skipped for the reasons")
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for side, color, label in (("input", OKABE_ITO[0], "input x"), ("output_grad", OKABE_ITO[1], "output gradient g")):
        spectra: list[Spectrum] = [getattr(layer, side) for layer in conditioning.values()]
        depth = np.arange(len(spectra))
        axes[0, 0].plot(depth, [s.lambda_max for s in spectra], "o-", color=color, label=label)
        for p, line in ((0.5, "o-"), (1.0, "s:")):
            kappa = np.array([s.condition_number(p) for s in spectra])
            kappa[~np.isfinite(kappa)] = np.nan
            axes[0, 1].plot(depth, kappa, line, color=color, label=rf"{label}, $\kappa_{{{100 * p:g}\%}}$")
        _spectra(axes[1, 0 if side == "input" else 1], spectra, f"Spectra: {label}")
    for ax, what in ((axes[0, 0], r"$\lambda_{max}$"), (axes[0, 1], r"$\kappa$ (missing: not known)")):
        ax.set(yscale="log", xlabel="layer, in forward order", title=f"{what} by depth")
        ax.legend(fontsize=8, frameon=False)
        ax.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _spectra(ax: Axes, spectra: Sequence[Spectrum], title: str) -> None:
    """Eigenvalues over lambda_max against their place, first layers dark and last ones light."""
    from matplotlib import colormaps

    for i, s in enumerate(spectra):
        if s.rank:
            known = s.eigenvalues[: s.rank].numpy() / s.lambda_max
            place = (np.arange(s.rank) + 1) / s.dim
            last = i == len(spectra) - 1
            color = OKABE_ITO[3] if last else colormaps["viridis"](0.85 * i / max(1, len(spectra) - 1))
            ax.plot(place, known, color=color, lw=2.2 if last else 1, label="last layer" if last else None)
    ax.set(yscale="log", xlim=(0, 1), xlabel="place in the spectrum, of d", ylabel=r"$\lambda / \lambda_{max}$")
    ax.set_title(title + " (dark: first layers)", fontsize=11)
    ax.legend(fontsize=8, frameon=False)
    ax.grid(alpha=0.3)


def _loaded(records: Records) -> list[Conditioning]:
    loaded = read_records(records) if isinstance(records, (str, Path)) else list(records)
    if not any(len(record) for record in loaded):
        raise ValueError("no record with a measured layer to plot; was the run probed (probe.every > 0)?")
    return loaded


def _label(records: Records) -> str:
    if not isinstance(records, (str, Path)):
        return "run"
    path = Path(records)
    return path.parent.name if path.suffix == ".jsonl" else path.name
