"""Why a moment has eigenvalues that are exactly zero: structure that no precision changes.

Looked for: coordinates that are 0 on every row (dying units, padding), coordinates that are multiples of
each other (constant pixels, copies), and rows that sum to zero (the gradient of a softmax cross-entropy
with respect to its logits, and that of all that only a LayerNorm reads).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PARALLEL = 1e-12  # how far |correlation| of two multiples of each other may be from 1 in float64
FLOAT32 = 2.0**-24  # its unit roundoff
ZERO, ZERO_IN_FLOAT64 = 1e-6, 1e-10  # of the mean E[g_i^2]: float64 shows true numbers of a billionth
SHOWN = 1 / 20  # of the mean E[g_i^2]: rows whose sum has less show that they sum to zero


@dataclass(frozen=True)
class Head:
    """What is known of a network's last layer.

    Attributes:
        softmax: whether the loss is a softmax cross-entropy; None: not known (a training's, or a callable).
        unit: what its p - y is multiplied with in the gradients: 1 over the labels of a sample that its mean is over.
        dtype: that the loss is computed in: under autocast not that of the data. Where it is not seen, the weights'.
    """

    softmax: bool | None = None
    unit: float = 1.0
    dtype: torch.dtype = torch.float32


def structural_nulls(
    moment: Float[Tensor, "g d d"], *, sums_to_zero: bool, vanished: bool = False, exact: bool = True
) -> tuple[int, str]:
    """How many eigenvalues are exactly zero by structure, and the reasons in words.

    Args:
        moment: [g, d, d] second moments.
        sums_to_zero: whether `zero_sum_remainder` found that each row does.
        vanished: whether a square of 0 may be of a number that is not.
        exact: whether these are float64 products; float32 ones do not tell a copy from a coordinate close to it.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    found = [(0 if vanished else int((~alive).sum()), "coordinates always 0")]
    copies = sum(_parallel(m, a) for m, a in zip(moment, alive, strict=True)) if exact else 0
    found.append((copies, "coordinates that copy another"))
    if sums_to_zero and int(alive.sum()) - copies > 1:  # of two coordinates one copies the other
        found.append((1, "rows sum to 0 (softmax, LayerNorm)"))
    present = [(count, why) for count, why in found if count]
    return sum(count for count, _ in present), ", ".join(f"{count}: {why}" for count, why in present)


def zero_sum_remainder(
    squared_sum: float,
    diagonal: Float[Tensor, "g d"],
    dtype: torch.dtype,
    head: Head | None = None,
    *,
    zero: float = ZERO,
) -> float | None:
    """E[(sum_i g_i)^2] / d where rows sum to zero but for the rounding of the data, else None.

    Args:
        squared_sum: E[(sum_i g_i)^2].
        diagonal: E[g_i^2]; of several groups there is no sum.
        dtype: of the data.
        head: of the network's last layer.
        zero: `ZERO_IN_FLOAT64` where the whole pass and its loss are in float64.

    Zero means under 1e-6 (1e-10 in float64; 20 u^2, for coarser data) of the mean E[g_i^2]: so little in exactly this
    direction does not come about by chance, but for two coordinates, where the rounding alone is let pass.

    In the network's last layer zero is also a sum whose square is under (4 u)^2: the gradient p - y of a confident
    softmax is small, but its rounding is that of p, which is near 1. To that comes d / 4 of float32's u^2: a softmax
    adds its d terms in float32 at best. Of a loss that is not known, computed in float32, the sum must be small beside
    the gradients, too: those of a regression, or of a loss with a factor, may be as small and no rounding at all.
    """
    groups, dim = diagonal.shape
    if groups > 1 or dim < 2:
        return None
    remainder, mean = max(0.0, squared_sum / dim), float(diagonal.sum()) / dim
    limit = max(zero if dim > 2 else 0.0, 20 * (torch.finfo(dtype).eps / 2) ** 2) * mean
    if head is not None and head.softmax is not False:
        roundoff = torch.finfo(head.dtype).eps / 2
        if head.softmax or roundoff > FLOAT32 or remainder <= SHOWN * mean:
            limit = max(limit, head.unit**2 * ((4 * roundoff) ** 2 / dim + min(roundoff, FLOAT32) ** 2 / 4))
    return remainder if mean > 0 and remainder <= limit else None


def zero_coordinates(rows: Float[Tensor, "g d k"]) -> tuple[int, str]:
    """How many coordinates are 0 on every row, and that in words."""
    count = int((rows == 0).all(2).sum())
    return count, f"{count}: coordinates always 0" if count else ""


def _parallel(moment: Float[Tensor, "d d"], alive: Bool[Tensor, " d"]) -> int:
    kept = moment[alive][:, alive]
    if kept.shape[0] < 2:
        return 0
    scale = kept.diagonal().rsqrt()
    same = (kept * scale[:, None] * scale[None, :]).abs() > 1 - PARALLEL
    first = same.to(torch.uint8).argmax(dim=1)  # the first coordinate that each is a multiple of
    return kept.shape[0] - int(first.unique().numel())
