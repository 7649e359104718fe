"""Every measure a claim can name: those of trainings, and here those of matrices, theorems and times."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from condzoo.experiments import training_measures as training
from condzoo.experiments.naive_cost import naive_counts
from condzoo.experiments.readings import (
    Data,
    Missing,
    Values,
    errors_by_seed,
    fitted_exponent,
    networks_of,
    paired,
    points_by_seed,
)


def curvature_ratio(data: Data, label: str, to: str, matrix: str, of: str, value: str = "lambda_max") -> Values:
    """A curvature matrix's lambda_max or kappa ("kappa 0.5") of one network over another's.

    `of` is "full", or "blocks": the geometric mean over the layers' blocks.
    """
    found = {}
    for one, other in paired(data, label, to, networks_of):
        levels = [curvature_level(network, matrix, of, value) for network in (one, other)]
        found[one["seed"]] = 10 ** (levels[0] - levels[1])
    return found


def full_over_largest_block(data: Data, label: str, matrix: str) -> Values:
    """lambda_max of the whole matrix over the largest of its diagonal blocks' (at least 1 for F, M and G)."""
    found = {}
    for network in networks_of(data, label):
        entries = network["matrices"][matrix]
        blocks = [entry["lambda_max"] for name, entry in entries.items() if name != "full"]
        found[network["seed"]] = entries["full"]["lambda_max"] / max(blocks)
    return found


def share_of_blocks_lower(data: Data, label: str, to: str, matrix: str, value: str) -> Values:
    """Share of the layers whose block's value is lower in one network than in the other.

    A kappa that is not known is infinite, see `ratio_between`; a layer of which neither is known does not count.
    """
    found = {}
    for one, other in paired(data, label, to, networks_of):
        pairs = [
            (entry_value(one["matrices"][matrix][name], value), entry_value(other["matrices"][matrix][name], value))
            for name in one["matrices"][matrix]
            if name != "full" and name in other["matrices"][matrix]
        ]
        known = [
            (math.inf if a is None else a) < (math.inf if b is None else b)
            for a, b in pairs
            if a is not None or b is not None
        ]
        if not known:
            raise Missing(f"{value} of {matrix} is known of no block of {label} or {to}")
        found[one["seed"]] = sum(known) / len(known)
    return found


def negative_eigenvalues(data: Data, label: str, matrix: str = "hessian") -> Values:
    """How many eigenvalues of the whole matrix are negative."""
    return {n["seed"]: float(n["matrices"][matrix]["full"]["negative"]) for n in networks_of(data, label)}


def largest_error(data: Data, quantity: str) -> Values:
    """The largest value over a seed's trials; NaN where a trial's is."""
    return {seed: float(np.max(errors)) for seed, errors in errors_by_seed(data, quantity).items()}


def smallest_error(data: Data, quantity: str) -> Values:
    """The smallest value over a seed's trials; NaN where a trial's is."""
    return {seed: float(np.min(errors)) for seed, errors in errors_by_seed(data, quantity).items()}


def time_ratio(data: Data, of: str, to: str) -> Values:
    """Seconds of one way over another's at the largest size of each row of sizes: the largest of the rows."""
    found = {}
    for seed, points in points_by_seed(data).items():
        rows = {point["varied"] for point in points}
        largest = [max((p for p in points if p["varied"] == row), key=lambda point: point[row]) for row in rows]
        found[seed] = max(point["seconds"][of] / point["seconds"][to] for point in largest)
    return found


def exponent(data: Data, way: str, over: str) -> Values:
    """The exponent with which a way's time grows with a size: least squares in logarithms over the larger half."""
    return {seed: fitted_exponent(points, over, way) for seed, points in points_by_seed(data).items()}


def exponent_difference(data: Data, way: str, than: str, over: str) -> Values:
    """How much larger one way's exponent is than another's: above 0 it grows faster."""
    one, other = exponent(data, way, over), exponent(data, than, over)
    return {seed: one[seed] - other[seed] for seed in one}


def exponent_over_naive(data: Data, way: str, over: str) -> Values:
    """How much larger a way's exponent is than its naive count's at the same sizes: below 0 it grows slower.

    The count is a sum of powers, so that its own exponent is under the highest of them.
    """
    counted = [point | {"seconds": naive_counts(point)} for point in data["points"]]
    naive = exponent({"points": counted}, way, over)
    return {seed: value - naive[seed] for seed, value in exponent(data, way, over).items()}


def curvature_level(network: dict[str, Any], matrix: str, of: str, value: str) -> float:
    """log10 of a value of the whole matrix, or its mean over the blocks that have it.

    Raises:
        Missing: it is not known.
    """
    entries = network["matrices"].get(matrix, {})
    chosen = [entries["full"]] if of == "full" else [entry for name, entry in entries.items() if name != "full"]
    known = [v for entry in chosen if (v := entry_value(entry, value)) is not None and v > 0]
    if not known:
        raise Missing(f"{network['label']}: {value} of {matrix} ({of}) is not known")
    return float(np.mean(np.log10(known)))


def entry_value(entry: dict[str, Any], value: str) -> float | None:
    """ "lambda_max", or "kappa 0.5" for kappa_p at p = 0.5, of one matrix; None where it is not known."""
    found = entry["kappa"].get(value.split()[1]) if value.startswith("kappa") else entry[value]
    return None if found is None else float(found)


MEASURES: dict[str, Callable[..., Values]] = {
    function.__name__: function
    for function in (
        training.slope_over_depth,
        training.spread_over_depth,
        training.ratio_between,
        training.variation_ratio,
        training.median_share,
        training.upper_minus_lower,
        training.final_loss,
        training.loss_ratio,
        training.final_error,
        training.error_difference,
        training.rank_correlation,
        training.loss_fall,
        training.converged,
        training.collapse,
        curvature_ratio,
        full_over_largest_block,
        share_of_blocks_lower,
        negative_eigenvalues,
        largest_error,
        smallest_error,
        time_ratio,
        exponent,
        exponent_difference,
        exponent_over_naive,
    )
}
