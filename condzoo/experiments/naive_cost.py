"""Section B's naive counts of operations, for the networks whose times are measured (growth.py).

P parameters in all, P_k of layer k with its bias, d_in inputs and d_out outputs a layer; N examples.
"""

import itertools
from typing import Any

CLASSES, PIXELS = 4, 4  # outputs of the networks, and pixels a side of their inputs


def naive_counts(point: dict[str, Any]) -> dict[str, float]:
    """Operations of each way for one size, without Lanczos: products over the examples, and eigenvalues.

    Whole N P^2 + P^3, by layer blocks the sum of N P_k^2 + P_k^3, by Kronecker factors that of N (d_in^2 + d_out^2) +
    d_in^3 + d_out^3: section B's counts with the layers as they are; the first and the last one are not d wide.
    """
    n, widths = point["examples"], [PIXELS**2, *[point["widths"]] * (point["layers"] - 1), CLASSES]
    layers = list(itertools.pairwise(widths))
    parameters = [(d_in + 1) * d_out for d_in, d_out in layers]
    return {
        "full": float(n * sum(parameters) ** 2 + sum(parameters) ** 3),
        "blocks": float(sum(n * p**2 + p**3 for p in parameters)),
        "kronecker": float(sum(n * (d_in**2 + d_out**2) + d_in**3 + d_out**3 for d_in, d_out in layers)),
    }
