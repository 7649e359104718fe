"""One sum of x x^T over a batch's rows: in float32 where that is worth its noise floor, else in float64.

Layers that read the same tensor (query, key and value of an attention, the branches of a block) have it taken once.
Shapes: g groups, d coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from condzoo.probe import arithmetic, rounding
from condzoo.probe.arithmetic import Precision

KEPT = 1 << 22  # numbers in products kept for what else may read the same: 32 MB; the latest is kept in any case


@dataclass(frozen=True, eq=False)
class Product:
    """A sum of x x^T, and what its arithmetic says of the rows.

    Attributes:
        total: [g, d, d] in float64.
        noise: floor of the sum, in its units, that float32 products leave.
        fast: they are float32 products.
        finite: no NaN or Inf was seen.
        vanished: a number that is not 0 had a square that is, in float64.
    """

    total: Tensor
    noise: float
    fast: bool = False
    finite: bool = True
    vanished: bool = False


def product_of(
    multiply: Callable[[bool], Float[Tensor, "g d d"]],
    rows: int,
    pieces: int | float,
    data: Tensor,
    precision: Precision,
    *,
    checked: bool,
) -> Product:
    """What `multiply` gives in the precision asked for; the arguments are those of `RunningMoment.add_product`."""
    if precision != "float64" and data.dtype != torch.float64:
        total = multiply(False)
        noise = arithmetic.float32_noise(total, pieces)
        # Squares of float32 data above 1e19 overflow, and those below 1e-19 vanish, though the data is as it is.
        vanishing = rows * torch.finfo(torch.float32).tiny
        in_range = math.isfinite(noise) and noise >= vanishing
        if total.shape[1] == 1:  # sums of squares, of which nothing cancels
            noise = arithmetic.SAFETY * vanishing
        columns = None if checked else data
        if in_range and rounding.holds(total, noise, columns, strictly=precision == "auto"):
            return Product(total, noise, fast=True)
    total = multiply(True)
    return Product(total, 0.0, False, *look_at(data, total.diagonal(dim1=-2, dim2=-1)))


def look_at(data: Tensor, squares: Float[Tensor, "g d"]) -> tuple[bool, bool]:
    """Whether the data are finite, and whether some have vanished in their squares.

    They are read only where their sums of squares, which hide no NaN or Inf, leave that open.
    """
    if not math.isfinite(float(squares.sum())):
        return bool(torch.isfinite(data).all()), False
    if data.dtype == torch.float64 and bool((squares == 0).any()):
        return True, bool(((data != 0) & (data.square() == 0)).any())
    return True, False


@dataclass(frozen=True, eq=False)
class Read:
    """A tensor that was read: what of it, as which change to it, and the product."""

    tensor: TensorWeakRef
    version: int
    part: object
    product: Product


@dataclass(eq=False)
class SharedProducts:
    """Products of the tensors that a forward pass read last, while these are there and nothing is written to them."""

    _reads: list[Read] = field(default_factory=list)

    def once(self, x: Tensor, part: object, make: Callable[[], Product]) -> Product:
        """A product of a part of x, made if it is not there. part: says which part, and how it is read."""
        if x.is_inference():
            return make()  # has no versions
        for read in self._reads:
            if read.part == part and read.version == x._version and read.tensor() is x:
                return read.product
        product = make()
        self._reads = _latest([Read(TensorWeakRef(x), x._version, part, product), *self._reads])
        return product

    def clear(self) -> None:
        """Forget them."""
        self._reads = []


def _latest(reads: list[Read]) -> list[Read]:
    kept, numbers = reads[:1], reads[0].product.total.numel()
    for read in reads[1:]:
        numbers += read.product.total.numel()
        if numbers > KEPT:
            break
        if read.tensor() is not None:
            kept.append(read)
    return kept
