"""Patch moments without patches: cross-correlations of a feature map with itself, and border terms.

For patch offsets u and v, with r over output positions and x~ the input x with zeros around it,

    M[(c, u), (c', v)] = sum_r x~_c[r + u] x~_c'[r + v] = C_{v-u}[c, c'] - sum_{q not in W_u} x_c[q] x~_c'[q + v - u]

where C_s[c, c'] = sum_q x_c[q] x~_c'[q + s] does not know u, and W_u is what r + u reaches (`borders` has the second
sum). So k x k patches take (2k - 1)^2 products in place of k^4; all C_s are the weight gradient of a convolution with
kernel 2k - 1 whose input and output gradient are both x.
Shapes: n images, c channels, h x w pixels, kernel kh x kw, k = kh * kw.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from condzoo.probe.arithmetic import CHAIN_FLOAT64, chains, plain_convolutions
from condzoo.probe.borders import LONGEST_SUM, Geometry, subtract_border
from condzoo.probe.patches import output_size, sides
from condzoo.probe.rounding import sums_of_squares

# Error of such a sum of squares over the sum, from which on roundings did not average out: of maps of noise, of smooth
# ones and of pictures it is under 5e-6, and of maps that are constant but for a few pixels over 4e-5.
ONE_WAY = 2.0**-17


def of_a_sum(height: int, width: int) -> tuple[int, int]:
    """How many images, and of each how many rows of positions, float32 adds."""
    return max(1, LONGEST_SUM // (height * width)), min(height, max(1, LONGEST_SUM // width))


def patch_gram(x: Float[Tensor, "n c h w"], conv: nn.Conv2d, wide: bool) -> Float[Tensor, "1 ck ck"]:
    """sum over patches of patch patch^T, coordinates ordered by channel, then offset.

    Args:
        x: input of the convolution.
        conv: gives kernel and padding; of stride and dilation 1, padded with zeros.
        wide: multiply in float64; else in float32, added in float64.
    """
    channels, (kh, kw) = x.shape[1], conv.kernel_size
    x = x if wide else x.float()
    half = None if wide else _correlations_float32(x, kh, kw)
    if half is None:
        wide, half = True, _correlations_float64(x, kh, kw)
    shifts = _with_negative_shifts(half).permute(2, 3, 0, 1).flatten(0, 1)
    gram = shifts.index_select(0, _differences(kh, kw, x.device))
    left, _, top, _ = sides(conv)
    (height, width), size = output_size(x, conv), (x.shape[2], x.shape[3])
    subtract_border(gram, x, Geometry(size, (height, width), (kh, kw), (top, left)), wide)
    blocks = gram.unflatten(0, (kh * kw, kh * kw))
    return blocks.permute(2, 0, 3, 1).reshape(1, channels * kh * kw, channels * kh * kw)


def _differences(kh: int, kw: int, device: torch.device) -> Tensor:
    """For each pair of offsets u and v, row by row, the place of v - u among the shifts."""
    rows, columns = torch.arange(kh, device=device), torch.arange(kw, device=device)
    down = (rows - rows[:, None] + kh - 1)[:, None, :, None]
    along = (columns - columns[:, None] + kw - 1)[None, :, None, :]
    return (down * (2 * kw - 1) + along).flatten()


def too_far_off(sums: Float[Tensor, " c"], squares: Float[Tensor, " c"]) -> bool:
    """Whether float32 sums of the squares of x are so far off that their roundings cannot have averaged out."""
    return bool(((sums - squares).abs() > ONE_WAY * squares).any())


def _correlations_float32(x: Float[Tensor, "n c h w"], kh: int, kw: int) -> Float[Tensor, "c c a b"] | None:
    """C_s for s in [0, kh - 1] x [-(kw - 1), kw - 1], one call a float32 sum; None where they are too far off."""
    size = [x.shape[1], x.shape[1], kh, 2 * kw - 1]
    half = x.new_zeros(size, dtype=torch.float64)
    images, rows = of_a_sum(*x.shape[2:])
    with plain_convolutions(x.device.type):
        held = x.new_zeros((min(images, len(x)), x.shape[1], x.shape[2] + kh - 1, x.shape[3]))  # rows of zeros below
        for part in x.split(images):
            below = held[: len(part)]
            below[:, :, : x.shape[2]] = part
            for top in range(0, x.shape[2], rows):
                here = part[:, :, top : top + rows]
                there = below[:, :, top : top + here.shape[2] + kh - 1]
                half += conv2d_weight(there, size, here, padding=(0, kw - 1))
    sums = half[:, :, 0, kw - 1].diagonal()
    return None if too_far_off(sums, sums_of_squares(x.flatten(2)[:, None])[0]) else half


def _with_negative_shifts(half: Float[Tensor, "c c a b"]) -> Float[Tensor, "c c d b"]:
    """All C_s from those with s_0 >= 0: C_{-s} is the transpose of C_s, to the last digit also where s_0 = 0."""
    center = half.shape[3] // 2
    half[:, :, 0, :center] = half[:, :, 0, center + 1 :].flip(2).transpose(0, 1)
    return torch.cat([half[:, :, 1:].flip(2, 3).transpose(0, 1), half], dim=2)


def _correlations_float64(x: Float[Tensor, "n c h w"], kh: int, kw: int) -> Float[Tensor, "c c a b"]:
    """The same by products of shifted maps."""
    channels, height, width = x.shape[1:]
    half = x.new_zeros((channels, channels, kh, 2 * kw - 1), dtype=torch.float64)
    for part in x.split(max(1, (1 << 19) // (channels * height * width))):
        images = part.double()
        for s, b in itertools.product(range(min(kh, height)), range(2 * kw - 1)):
            t = b - kw + 1
            if abs(t) < width:
                here = images[:, :, : height - s, max(0, -t) : width - max(0, t)]
                there = images[:, :, s:, max(0, t) : width + min(0, t)]
                for rows in chains(torch.stack([here, there], 1).flatten(3), CHAIN_FLOAT64):
                    half[:, :, s, b] += torch.bmm(rows[:, 0], rows[:, 1].mT).sum(0)
    return half
