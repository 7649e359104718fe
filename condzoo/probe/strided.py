"""Patch moments of convolutions with a stride or dilation, as weight gradients: patches are cut out on one side alone.

With i the row and j the column of an offset, and r over output positions,

    M[(c, i, j), (c', i', j')] = sum_r g_(j, c)[r] x~_c'[r * stride + (i', j') * dilation]
    g_(j, c)[r] = x~_c[r * stride + (i, j) * dilation]

is the gradient of a convolution's weight [kw * c, c', kh - i, kw] with input x~ from row i * dilation on and output
gradient g: one call for each i, of the offsets with i' >= i. The others are transposes.
Shapes: n images, c channels, h x w pixels, kernel kh x kw, k = kh * kw.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from condzoo.probe.arithmetic import gram_float64, plain_convolutions
from condzoo.probe.correlations import of_a_sum, too_far_off
from condzoo.probe.layers import ROWS_OF_PATCHES
from condzoo.probe.patches import every, output_size, padded, unfolded
from condzoo.probe.rounding import sums_of_squares


def strided_gram(x: Float[Tensor, "n c h w"], conv: nn.Conv2d, wide: bool) -> Float[Tensor, "1 ck ck"]:
    """sum over patches of patch patch^T, coordinates ordered by channel, then offset.

    Args:
        x: input of the convolution.
        conv: gives kernel, padding, stride and dilation; of one group.
        wide: multiply in float64; else in float32, added in float64.
    """
    found = None if wide else _moment_float32(x, conv)
    if found is None:
        dim = x.shape[1] * math.prod(conv.kernel_size)
        found = x.new_zeros((1, dim, dim), dtype=torch.float64)
        for part in unfolded(x, conv, ROWS_OF_PATCHES):
            found += gram_float64(part)
    return found


def _moment_float32(x: Float[Tensor, "n c h w"], conv: nn.Conv2d) -> Float[Tensor, "1 ck ck"] | None:
    """The same by convolutions; None where its sums are too far off."""
    channels, (kh, kw) = x.shape[1], conv.kernel_size
    moment = x.new_zeros((kh, kw, channels, channels, kh, kw), dtype=torch.float64)
    height, width = output_size(x, conv)
    images, rows = of_a_sum(height, width)
    frame = padded(x.float(), conv)
    with plain_convolutions(x.device.type):
        for part in frame.split(images):
            for top in range(0, height, rows):
                _add(moment, part, conv, range(top, min(top + rows, height)), width)
    down, along = every(conv, conv.stride)
    first = frame[:, :, : (height - 1) * down + 1 : down, : (width - 1) * along + 1 : along]  # what offset 0 reaches
    if too_far_off(moment[0, 0, :, :, 0, 0].diagonal(), sums_of_squares(first.flatten(2)[:, None])[0]):
        return None
    for i in range(1, kh):  # what is above the diagonal of rows, turned
        moment[i, :, :, :, :i] = moment[:i, :, :, :, i].permute(4, 3, 2, 0, 1)
    return moment.permute(2, 0, 1, 3, 4, 5).reshape(1, channels * kh * kw, channels * kh * kw)


def _add(moment: Tensor, frame: Float[Tensor, "n c ph pw"], conv: nn.Conv2d, rows: range, width: int) -> None:
    """Add the products of some rows of output positions, for offsets (i, j) and (i', j') with i' >= i."""
    (kh, kw), (down, along) = conv.kernel_size, every(conv, conv.stride)
    (below, right), channels, height = every(conv, conv.dilation), frame.shape[1], len(rows)
    for i in reversed(range(kh)):
        start = rows.start * down + i * below
        there = frame[:, :, start : start + (height - 1) * down + (kh - 1 - i) * below + 1]
        there = there[..., : (width - 1) * along + (kw - 1) * right + 1]
        grad = there[:, :, : (height - 1) * down + 1 : down]
        grads = [grad[..., j * right : j * right + (width - 1) * along + 1 : along] for j in range(kw)]
        size = [kw * channels, channels, kh - i, kw]
        products = conv2d_weight(there, size, torch.cat(grads, 1), stride=(down, along), dilation=(below, right))
        moment[i, :, :, :, i:] += products.unflatten(0, (kw, channels))
