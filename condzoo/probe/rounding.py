"""Whether the roundings of float32 sums average out, as noise floors take them to.

A number that is added again and again is rounded to the same side each time, and so are all of a map that is constant
but for a few pixels (pictures on a background, dying units with a bias). Sums of squares show it: they are there in
every second moment, and are quickly taken once more.
Shapes: b pieces, g groups, d coordinates, k rows a piece.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Error of a sum of x_i^2, in roundings of the trace over sqrt(pieces), that may be one of chance: of 4 coordinates or
# more it is less. Errors in one direction are no larger in that of a small eigenvalue than the largest of these.
BY_CHANCE = 3 * 2.0**-24
CHECKED = 64  # coordinates up to which a Cholesky takes less time than the sums of squares do
# Of so few coordinates, in chains of as many rows, errors in one direction show further above the floor: they are up
# to 13 u of ||M|| in that of a small eigenvalue, and of fewer than `FEW` more than sums of squares show.
NARROW, ROOM, FEW = 16, 8, 4
SLICE = 1 << 17  # elements converted to float64 at a time: 1 MB stays in a CPU's cache
GPU_SLICE = 1 << 24  # the same on a GPU, or of the products: it needs much work at a time; 128 MB (not run on one)


def holds(
    total: Float[Tensor, "g d d"], noise: float, columns: Float[Tensor, "b g d k"] | None, *, strictly: bool
) -> bool:
    """Whether a sum of float32 products is worth its floor.

    Args:
        total: the sum; noise: its `float32_noise`.
        columns: the rows, in as many pieces as there are products. Where roundings of rows that are alike go in one
            direction, and an eigenvalue is small enough to show it, the sum is not. None: that was looked at.
        strictly: nor is it where an eigenvalue may lie under the floor.
    """
    small = True
    if columns is not None and total.shape[-1] > 1:
        pieces, dim = columns.shape[0], columns.shape[2]
        room = ROOM if dim <= NARROW else 1
        small = dim > CHECKED or reaches_under(total, noise * math.sqrt(min(pieces, dim)) * room)  # none averages out
        sums = total.diagonal(dim1=-2, dim2=-1)
        if small and (dim < FEW or rounded_one_way(sums, sums_of_squares(columns), pieces)):
            return False
    return not (strictly and small and reaches_under(total, noise))


def reaches_under(total: Float[Tensor, "g d d"], floor: float) -> bool:
    """Whether an eigenvalue may lie under the floor: one Cholesky of total - floor * I.

    Coordinates that are exactly zero on every row are nulls in any arithmetic and do not count.
    """
    shifted = total.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal -= floor
    if not bool(torch.linalg.cholesky_ex(shifted).info.any()):
        return False
    zero = total.diagonal(dim1=-2, dim2=-1) == 0
    if not bool(zero.any()):
        return True
    diagonal[zero] = 1.0
    return bool(torch.linalg.cholesky_ex(shifted).info.any())


def sums_of_squares(columns: Float[Tensor, "b g d k"]) -> Float[Tensor, "g d"]:
    """sum over pieces and rows of x_i^2: torch adds them in pairs, which leaves 1e-6 of it at most in float32."""
    step = max(1, (SLICE if columns.device.type == "cpu" else GPU_SLICE) // columns[0].numel())
    parts = [part.float().square().sum(3).sum(0, dtype=torch.float64) for part in columns.split(step)]
    return torch.stack(parts).sum(0)


def rounded_one_way(sums: Float[Tensor, "g d"], squares: Float[Tensor, "g d"], pieces: int) -> bool:
    """Whether sums of squares are so far off that their roundings cannot have averaged out.

    Args:
        sums: of x_i^2 by float32 products; squares: `sums_of_squares`.
        pieces: that many products, if they are independent, leave as much noise.
    """
    trace = float(squares.sum(-1).max())
    return float((sums - squares).abs().max()) > BY_CHANCE * trace / math.sqrt(min(pieces, sums.shape[-1]))
