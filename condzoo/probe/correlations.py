"""Patch moments without patches: cross-correlations of a feature map with itself, and border terms.

For patch offsets u and v, with r over output positions and x~ the input x with zeros around it,

    M[(c, u), (c', v)] = sum_r x~_c[r + u] x~_c'[r + v] = C_{v-u}[c, c'] - sum_{q not in W_u} x_c[q] x~_c'[q + v - u]

where C_s[c, c'] = sum_q x_c[q] x~_c'[q + s] does not know u, and W_u is what r + u reaches. So k x k patches
take (2k - 1)^2 products in place of k^4; all C_s are the weight gradient of a convolution with kernel 2k - 1
whose input and output gradient are both x. The border terms involve first and last rows and columns only.
Shapes: n images, c channels, h x w pixels, kernel kh x kw, k = kh * kw.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

CHUNKS = 16  # float32 sums that are added in float64
PIECES = 8  # as which they count for the noise: border terms are a single sum


def correlates(conv: nn.Module, x: Tensor) -> bool:
    """Whether `patch_gram` serves this layer.

    That is a Conv2d with stride and dilation 1, one group and zero padding, on a map clearly larger than
    its kernel and with as many rows as coordinates.
    """
    if not isinstance(conv, nn.Conv2d) or x.ndim != 4 or conv.groups > 1 or conv.padding_mode != "zeros":
        return False
    if set(conv.stride) | set(conv.dilation) != {1} or conv.kernel_size == (1, 1):
        return False
    if 2 * positions(conv, x) < x.shape[2] * x.shape[3]:  # the border terms would cancel most of the sum
        return False
    rows = x.shape[0] * positions(conv, x)
    return rows >= x.shape[1] * conv.kernel_size[0] * conv.kernel_size[1]


def positions(conv: nn.Conv2d, x: Float[Tensor, "n c h w"]) -> int:
    """Output positions an image."""
    height, width = _output_size(conv, x)
    return height * width


def patch_gram(x: Float[Tensor, "n c h w"], conv: nn.Conv2d, wide: bool) -> Float[Tensor, "1 ck ck"]:
    """sum over patches of patch patch^T, coordinates ordered by channel, then offset.

    Args:
        x: input of the convolution.
        conv: gives kernel and padding.
        wide: multiply in float64; else in float32, added in float64.
    """
    channels, (kh, kw) = x.shape[1], conv.kernel_size
    x = x.contiguous() if wide else x.float().contiguous()
    every = _correlations_float64(x, kh, kw) if wide else _correlations_float32(x, kh, kw)
    offsets = list(itertools.product(range(kh), range(kw)))
    shift = [[(v[0] - u[0] + kh - 1) * (2 * kw - 1) + v[1] - u[1] + kw - 1 for v in offsets] for u in offsets]
    index = torch.tensor(shift, device=x.device)
    gram = every.flatten(2)[:, :, index.flatten()].unflatten(2, index.shape).permute(0, 2, 1, 3).contiguous()
    # Pixel by pixel, so that the few that a border term takes are contiguous: [h', w', c, n].
    frame = F.pad(x, (kw - 1, kw - 1, kh - 1, kh - 1)).permute(2, 3, 1, 0).contiguous()
    for i, u in enumerate(offsets):
        outside = _outside(conv, x, u)
        if outside.shape[1]:  # only v from u on: the rest is symmetric
            gram[:, i, :, i:] -= _border(frame, outside, u, offsets[i:], conv.kernel_size, wide)
    for i in range(len(offsets)):
        gram[:, i + 1 :, :, i] = gram[:, i, :, i + 1 :].permute(1, 2, 0)
    return gram.reshape(1, channels * kh * kw, channels * kh * kw)


def _correlations_float32(x: Float[Tensor, "n c h w"], kh: int, kw: int) -> Float[Tensor, "c c a b"]:
    """C_s for s in [0, kh - 1] x [-(kw - 1), kw - 1], in one call a chunk of images."""
    size = (x.shape[1], x.shape[1], kh, 2 * kw - 1)
    half = x.new_zeros(size, dtype=torch.float64)
    for part in x.chunk(CHUNKS):
        half += conv2d_weight(F.pad(part, (0, 0, 0, kh - 1)), list(size), part, padding=(0, kw - 1))
    return _with_negative_shifts(half)


def _with_negative_shifts(half: Float[Tensor, "c c a b"]) -> Float[Tensor, "c c d b"]:
    """All C_s from those with s_0 >= 0: C_{-s} is the transpose of C_s."""
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
                half[:, :, s, b] += torch.bmm(here.flatten(2), there.flatten(2).mT).sum(0)
    return _with_negative_shifts(half)


def _output_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    kh, kw = conv.kernel_size
    return x.shape[2] + top + bottom - kh + 1, x.shape[3] + left + right - kw + 1


def _outside(conv: nn.Conv2d, x: Tensor, u: tuple[int, int]) -> Int[Tensor, "2 q"]:
    """Pixels of x that no output position reaches at offset u, as rows and columns."""
    left, _, top, _ = conv._reversed_padding_repeated_twice
    height, width = _output_size(conv, x)
    row = torch.arange(x.shape[2], device=x.device) - (u[0] - top)
    column = torch.arange(x.shape[3], device=x.device) - (u[1] - left)
    inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None]
    return (~inside).nonzero().T


def _border(
    frame: Float[Tensor, "a b c n"],
    outside: Int[Tensor, "2 q"],
    u: tuple[int, int],
    offsets: list[tuple[int, int]],
    kernel: tuple[int, ...],
    wide: bool,
) -> Float[Tensor, "c c k"]:
    """sum over q outside W_u of x[q] x~[q + v - u] for the given v; `frame` is x~ from (1 - kh, 1 - kw) on."""
    kh, kw = kernel
    width, channels = frame.shape[1], frame.shape[2]
    pixels = frame.flatten(0, 1)
    place = (outside[0] + kh - 1) * width + outside[1] + kw - 1  # [q]
    steps = torch.tensor([(v[0] - u[0]) * width + v[1] - u[1] for v in offsets], device=frame.device)
    total = frame.new_zeros((channels, len(offsets), channels), dtype=torch.float64)
    for part in place.split(16):
        here = pixels.index_select(0, part)  # [q, c, n]
        there = pixels.index_select(0, (part[:, None] + steps).flatten()).unflatten(0, (len(part), -1)).flatten(1, 2)
        product = here.double() @ there.double().mT if wide else here @ there.mT
        total += product.sum(0, dtype=torch.float64).unflatten(1, (len(offsets), channels))
    return total.transpose(1, 2)
