"""Which way a Conv2d's patches are multiplied: correlated, as weight gradients, or unfolded as those of others are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from condzoo.probe.correlations import of_a_sum, patch_gram
from condzoo.probe.patches import every, output_size
from condzoo.probe.strided import strided_gram

FEWEST_CHANNELS = 16  # of fewer, convolutions leave more noise in as many rows, and unfolding takes no longer
LARGEST_KERNEL = 11  # whose border terms are listed in 0.3 s, once; those of 21 take 6 s
CONVOLUTION = 2  # times as much noise (squared) as products leave in as many rows


class PatchProducts(NamedTuple):
    """A sum of patch patch^T over `rows` patches.

    Attributes:
        multiply: gives it, by float64 products (True) or by float32 ones added in float64.
        shape: (1, d) of it.
        rows: patches.
        pieces: how many float32 products, added in float64, leave as much noise as those of `multiply`.
    """

    multiply: Callable[[bool], Float[Tensor, "1 d d"]]
    shape: tuple[int, int]
    rows: int
    pieces: float


def patch_products(conv: nn.Module, x: Tensor) -> PatchProducts | None:
    """How a layer's patches are multiplied without unfolding them; None where they are to be unfolded.

    Not unfolded are those of a Conv2d of one group and 16 channels or more, with as many patches as coordinates. On a
    GPU all are: cuDNN chooses among algorithms (Winograd's, or one by FFT), whose noise was not measured.
    """
    if not isinstance(conv, nn.Conv2d) or x.ndim != 4 or conv.groups > 1 or conv.kernel_size == (1, 1):
        return None
    if x.shape[1] < FEWEST_CHANNELS or x.device.type != "cpu":
        return None
    size, output = (x.shape[2], x.shape[3]), output_size(x, conv)
    rows, dim = x.shape[0] * math.prod(output), x.shape[1] * math.prod(conv.kernel_size)
    if rows < dim:
        return None
    correlated = correlates(conv, size, output)
    height, width = size if correlated else output
    images, lines = of_a_sum(height, width)
    pieces = math.ceil(x.shape[0] / images) * math.ceil(height / lines) / CONVOLUTION
    return PatchProducts(partial(patch_gram if correlated else strided_gram, x, conv), (1, dim), rows, pieces)


def correlates(conv: nn.Conv2d, size: tuple[int, int], output: list[int]) -> bool:
    """Whether patches are those of stride and dilation 1, on a map padded with zeros and clearly larger than they are.

    On others the border terms would cancel most of the sum; of large kernels there are too many of them.
    """
    if max(conv.kernel_size) > LARGEST_KERNEL:
        return False
    if {*every(conv, conv.stride), *every(conv, conv.dilation)} != {1} or conv.padding_mode != "zeros":
        return False
    return 2 * math.prod(output) >= math.prod(size)
