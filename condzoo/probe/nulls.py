"""Why a moment has eigenvalues that are exactly zero: structure that no precision changes.

Looked for: coordinates that are 0 on every row (dead units, padding), coordinates that are multiples of
each other (constant pixels, copies), and rows that sum to zero (the gradient of a softmax cross-entropy
with respect to its logits).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PARALLEL = 1e-12  # how far |correlation| of two multiples of each other may be from 1 in float64


def structural_nulls(
    moment: Float[Tensor, "g d d"], noise_floor: float, *, gradient: bool
) -> tuple[int, str]:
    """How many eigenvalues are exactly zero by structure, and the reasons in words.

    Args:
        moment: [g, d, d] second moments, float64 products.
        noise_floor: in the moment's units; a sum over a row under it is zero.
        gradient: whether rows that sum to zero are to be expected.
    """
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    found = [(int((~alive).sum()), "coordinates always 0")]
    found.append((sum(_parallel(m, a) for m, a in zip(moment, alive, strict=True)), "coordinates that copy another"))
    if gradient:
        total = moment.sum(dim=(1, 2)) / alive.sum(dim=1).clamp(min=1)
        zero_sums = (total.abs() <= noise_floor) & (alive.sum(dim=1) > 2)
        found.append((int(zero_sums.sum()), "rows sum to 0 (softmax)"))
    present = [(count, why) for count, why in found if count]
    return sum(count for count, _ in present), ", ".join(f"{count}: {why}" for count, why in present)


def zero_coordinates(diagonal: Float[Tensor, "g d"]) -> tuple[int, str]:
    """How many coordinates are 0 on every row, and that in words."""
    count = int((diagonal == 0).sum())
    return count, f"{count}: coordinates always 0" if count else ""


def _parallel(moment: Float[Tensor, "d d"], alive: Bool[Tensor, " d"]) -> int:
    kept = moment[alive][:, alive]
    if kept.shape[0] < 2:
        return 0
    scale = kept.diagonal().rsqrt()
    same = (kept * scale[:, None] * scale[None, :]).abs() > 1 - PARALLEL
    first = same.to(torch.uint8).argmax(dim=1)  # the first coordinate that each is a multiple of
    return kept.shape[0] - int(first.unique().numel())
