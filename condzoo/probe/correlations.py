"""Patch moments without patches: cross-correlations of a feature map with itself, and border terms.

For patch offsets u and v, with r over output positions and x~ the input x with zeros around it,

    M[(c, u), (c', v)] = sum_r x~_c[r + u] x~_c'[r + v] = C_{v-u}[c, c'] - sum_{q not in W_u} x_c[q] x~_c'[q + v - u]

where C_s[c, c'] = sum_q x_c[q] x~_c'[q + s] does not know u, and W_u is what r + u reaches. So k x k patches
take (2k - 1)^2 products in place of k^4; all C_s are the weight gradient of a convolution with kernel 2k - 1
whose input and output gradient are both x. Outside W_u are whole rows R_u and whole columns Q_u, so the border
term is that of R_u, which depends on columns by v_1 - u_1 alone, plus that of Q_u, less that of their corners.
Shapes: n images, c channels, h x w pixels, kernel kh x kw, k = kh * kw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from condzoo.probe.arithmetic import plain_convolutions

CHUNKS = 8  # float32 sums that are added in float64
PIECES = 4  # as which they count for the noise: border terms are fewer
BORDER_SUMS = 4  # float32 sums of a border term, at most


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
    gram = every.permute(2, 3, 0, 1).flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
    border = Border(x, conv, wide)
    for (i, u), (j, v) in itertools.combinations_with_replacement(enumerate(offsets), 2):
        for term, sign in border.terms(u, v):
            gram[i, j] -= sign * term
        if i != j:
            gram[j, i] = gram[i, j].T
    return gram.permute(2, 0, 3, 1).reshape(1, channels * kh * kw, channels * kh * kw)


def _correlations_float32(x: Float[Tensor, "n c h w"], kh: int, kw: int) -> Float[Tensor, "c c a b"]:
    """C_s for s in [0, kh - 1] x [-(kw - 1), kw - 1], in one call a chunk of images."""
    size = (x.shape[1], x.shape[1], kh, 2 * kw - 1)
    half = x.new_zeros(size, dtype=torch.float64)
    with plain_convolutions(x.device.type):
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


class Border:
    """What C_{v-u} has and the sum over patches has not, each region and shift summed once."""

    def __init__(self, x: Float[Tensor, "n c h w"], conv: nn.Conv2d, wide: bool) -> None:
        left, _, top, _ = conv._reversed_padding_repeated_twice
        self.x, self.wide = x, wide
        reach = _output_size(conv, x)
        self.rows = [_outside(x.shape[2], reach[0], u - top) for u in range(conv.kernel_size[0])]
        self.columns = [_outside(x.shape[3], reach[1], u - left) for u in range(conv.kernel_size[1])]
        self.found: dict[tuple[object, ...], Tensor | None] = {}

    def terms(self, u: tuple[int, int], v: tuple[int, int]) -> Iterator[tuple[Float[Tensor, "c c"], int]]:
        """The sums over q of x[q] x~[q + v - u] that make up the border term of u and v, with their signs."""
        shift = v[0] - u[0], v[1] - u[1]
        every = [range(size) for size in self.x.shape[2:]]
        rows, columns = self.rows[u[0]], self.columns[u[1]]
        for region, sign in (((rows, every[1]), 1), ((every[0], columns), 1), ((rows, columns), -1)):
            key = (*(tuple(part) for part in region), shift)
            if key not in self.found:
                self.found[key] = self._sum(region[0], region[1], shift)
            if (term := self.found[key]) is not None:
                yield term, sign

    def _sum(self, rows: Sequence[int], columns: Sequence[int], shift: tuple[int, int]) -> Float[Tensor, "c c"] | None:
        height, width = self.x.shape[2:]
        rows = [q for q in rows if 0 <= q + shift[0] < height]
        columns = [q for q in columns if 0 <= q + shift[1] < width]
        if not rows or not columns:
            return None
        here = self._pixels(rows, columns)
        there = self._pixels([q + shift[0] for q in rows], [q + shift[1] for q in columns])
        return torch.bmm(here, there.mT).sum(0, dtype=torch.float64)

    def _pixels(self, rows: list[int], columns: list[int]) -> Float[Tensor, "b c q"]:
        """The pixels at rows x columns, consecutive images side by side, in the dtype of the products."""
        part = self.x[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if len(rows) * len(columns) < part.shape[2] * part.shape[3]:  # first and last, not between
            part = part[:, :, [q - rows[0] for q in rows]][:, :, :, [q - columns[0] for q in columns]]
        part = part.double() if self.wide else part
        groups = math.gcd(len(part), BORDER_SUMS)
        return part.flatten(2).unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)


def _outside(size: int, reach: int, start: int) -> list[int]:
    """Which of `size` pixels are not in start, start + 1, ..., start + reach - 1."""
    return [q for q in range(size) if not start <= q < start + reach]
