"""Figures of exact matrices, of theorems and of measured times."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from condzoo.experiments.readings import errors_by_seed, fitted_exponent, points_by_seed
from condzoo.experiments.schema import Experiment
from condzoo.experiments.training_figures import tidy
from condzoo.probe.picture_style import MARKERS, OKABE_ITO, run_style

MATRICES = {"fisher": "F", "grad_moment": "M", "hessian": "H"}
WAYS = {"full": "exact, whole", "blocks": "exact, layer by layer", "kronecker": "Kronecker factors"}
ERRORS = {
    "input": r"inputs, $\sqrt{\lambda_{max}(\Sigma_x)}$",
    "output_grad": r"gradients, $\sqrt{\lambda_{max}(\Sigma_{\nabla h})}$",
    "weight_grad": r"$\sigma_{max}(\partial L/\partial W)$",
    "lambda_max": r"$\lambda_{max}$ of the product",
    "kappa": r"$\kappa$ of the product",
    "spectrum": "all eigenvalues",
    "nearest": r"$\lambda_{max}$: exact block / product," "\nleast layer",
    "farthest": r"$\lambda_{max}$: exact block / product," "\nlargest layer",
    "eps_exponent": "power of BN's eps with which\nthe largest error grows",
}
UNITS = {"nearest": "ratio", "farthest": "ratio", "eps_exponent": "exponent"}
SIZES = {"examples": "N, examples", "layers": "L, layers", "widths": "d, units a layer"}


def initialization(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """A row a matrix: lambda_max and kappa_p of every layer's block, and of the whole matrix beside them."""
    matrices = list(data["networks"][0]["matrices"])
    known = {matrix: [p for p in data["p"] if any_known(data, matrix, p)] for matrix in matrices}
    columns = 1 + max(len(ps) for ps in known.values())
    figure.set_size_inches(3.7 * columns + 0.4, 2.9 * len(matrices) + 1.0)
    axes = figure.subplots(len(matrices), columns, squeeze=False)
    for row, matrix in enumerate(matrices):
        symbol = MATRICES[matrix]
        draw_values(axes[row, 0], data, matrix, None)
        axes[row, 0].set_title(rf"$\lambda_{{max}}$ of ${symbol}_k$, and of ${symbol}$", fontsize=10)
        for column in range(1, columns):
            if column <= len(known[matrix]):
                p = known[matrix][column - 1]
                draw_values(axes[row, column], data, matrix, p)
                title = rf"$\kappa_{{{100 * p:g}\%}}$ of ${symbol}_k$, and of ${symbol}$"
                axes[row, column].set_title(title, fontsize=10)
            else:
                axes[row, column].set_axis_off()
    axes[0, 0].legend(fontsize=8, frameon=False)


def any_known(data: dict[str, Any], matrix: str, p: float) -> bool:
    """Whether any kappa_p of a matrix is known (none is of a Hessian, which has negative eigenvalues)."""
    entries = (entry for network in data["networks"] for entry in network["matrices"][matrix].values())
    return matrix != "hessian" and any(entry["kappa"][f"{p:g}"] is not None for entry in entries)


def draw_values(ax: Axes, data: dict[str, Any], matrix: str, p: float | None) -> None:
    """One value by layer, a line a network with the range over seeds; the whole matrix at the right end."""
    labels = list(dict.fromkeys(network["label"] for network in data["networks"]))
    for i, label in enumerate(labels):
        networks = [network["matrices"][matrix] for network in data["networks"] if network["label"] == label]
        names = [name for name in networks[0] if name != "full"]
        table = np.array([[value_of(n[name], p) for name in [*names, "full"]] for n in networks], dtype=float)
        middle = np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in table.T])
        places = np.arange(1, len(names) + 1)
        color = OKABE_ITO[i]
        ax.plot(places, middle[:-1], color=color, marker=MARKERS[i], markersize=4, label=label)
        lowest, highest = (reduce(table[:, :-1], axis=0) for reduce in (np.fmin.reduce, np.fmax.reduce))
        ax.fill_between(places, lowest, highest, color=color, alpha=0.2, lw=0)
        ax.plot([len(names) + 1] * len(table), table[:, -1], MARKERS[i], color=color, mfc="none", markersize=7)
    shown = list(range(1, len(names) + 1))
    ax.set_xticks([*shown, len(names) + 1], [*map(str, shown), "all"])
    ax.set(yscale="log", xlabel="layer", xlim=(0.6, len(names) + 1.4))
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.5, high * 1.5)
    ax.yaxis.set_minor_formatter(NullFormatter())
    tidy(ax)


def value_of(entry: dict[str, Any], p: float | None) -> float:
    """lambda_max, or kappa_p; NaN where it is not known."""
    value = entry["lambda_max"] if p is None else entry["kappa"][f"{p:g}"]
    return np.nan if value is None else float(value)


def theory(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """A panel a quantity: each trial's value in ascending order, a colour a seed."""
    quantities = list(data["trials"][0]["errors"])
    figure.set_size_inches(3.2 * len(quantities) + 0.4, 3.6)
    axes = figure.subplots(1, len(quantities), squeeze=False)[0]
    for ax, quantity in zip(axes, quantities, strict=True):
        for i, seed in enumerate(data["seeds"]):
            values = np.sort(errors_by_seed(data, quantity)[seed])
            shown = np.maximum(values, 1e-17)  # an error of exactly 0 stays on a logarithmic axis
            style = run_style(i) | {"linestyle": "none", "markersize": 3}
            ax.plot(shown, **style, label=f"seed {seed}")
        ax.set(yscale="linear" if quantity == "eps_exponent" else "log", xlabel="trial, ascending")
        ax.set_title(ERRORS[quantity], fontsize=9)
        low, high = (float(limit) for limit in ax.get_ylim())
        ax.set_ylim(low / 3, high * 3)  # so that a whole decade is labelled
        ax.yaxis.set_minor_formatter(NullFormatter())
        if quantity == "eps_exponent":
            ax.set_ylim(0, 2)  # that no two trials differ to the eye is what there is to see
        ax.set_ylabel(UNITS.get(quantity, "relative error, largest of the layers"), fontsize=8)
        tidy(ax)
    axes[0].legend(fontsize=7, frameon=False)


def growth(figure: Any, data: dict[str, Any], experiment: Experiment) -> None:
    """A panel a size: seconds of each way, median over seeds and range, with the median of the fitted exponents."""
    by_seed = points_by_seed(data)
    figure.set_size_inches(12, 4.2)
    axes = figure.subplots(1, 3)
    for ax, (size, name) in zip(axes, SIZES.items(), strict=True):
        points = [point for point in data["points"] if point["varied"] == size]
        sizes = sorted({point[size] for point in points})
        for i, (way, label) in enumerate(WAYS.items()):
            exponent = np.median([fitted_exponent(own, size, way) for own in by_seed.values()])
            seconds = [[point["seconds"][way] for point in points if point[size] == value] for value in sizes]
            style: dict[str, Any] = {"marker": MARKERS[i], "color": OKABE_ITO[i]}
            ax.plot(sizes, [np.median(s) for s in seconds], **style, label=f"{label}: exponent {exponent:.2f}")
            ax.fill_between(
                sizes, [min(s) for s in seconds], [max(s) for s in seconds], color=OKABE_ITO[i], alpha=0.2, lw=0
            )
        ax.set(xscale="log", yscale="log", xlabel=name)
        ax.set_xticks(sizes, [str(value) for value in sizes])
        ax.minorticks_off()
        tidy(ax)
        ax.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("seconds")
