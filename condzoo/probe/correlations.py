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
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from condzoo.probe.arithmetic import LONGEST_SUM, plain_convolutions
from condzoo.probe.patches import every, sides

FEWEST_CHANNELS = 16  # of fewer, convolutions leave more noise in as many rows, and unfolding takes no longer
CONVOLUTION = 2  # times as much noise (squared) as products leave in as many rows

Lines = tuple[int, ...]  # which rows or columns of a map


def correlates(conv: nn.Module, x: Tensor) -> bool:
    """Whether `patch_gram` serves this layer.

    That is a Conv2d with stride and dilation 1, one group and zero padding, on a map of 16 channels or more that is
    clearly larger than its kernel and has as many rows as coordinates. On a GPU none is: cuDNN chooses among algorithms
    (Winograd's, or one by FFT), whose noise was not measured. Unfolded patches are multiplied as all other rows are.
    """
    if not isinstance(conv, nn.Conv2d) or x.ndim != 4 or conv.groups > 1 or conv.padding_mode != "zeros":
        return False
    if x.shape[1] < FEWEST_CHANNELS or x.device.type != "cpu":
        return False
    if {*every(conv, conv.stride), *every(conv, conv.dilation)} != {1} or conv.kernel_size == (1, 1):
        return False
    if 2 * positions(conv, x) < x.shape[2] * x.shape[3]:  # the border terms would cancel most of the sum
        return False
    rows = x.shape[0] * positions(conv, x)
    return rows >= x.shape[1] * conv.kernel_size[0] * conv.kernel_size[1]


def positions(conv: nn.Conv2d, x: Float[Tensor, "n c h w"]) -> int:
    """Output positions an image."""
    height, width = _output_size(conv, x)
    return height * width


def pieces(x: Float[Tensor, "n c h w"]) -> float:
    """How many float32 products, added in float64, leave as much noise as `patch_gram` of this map."""
    images, rows = _of_a_sum(x)
    return math.ceil(x.shape[0] / images) * math.ceil(x.shape[2] / rows) / CONVOLUTION


def patch_gram(x: Float[Tensor, "n c h w"], conv: nn.Conv2d, wide: bool) -> Float[Tensor, "1 ck ck"]:
    """sum over patches of patch patch^T, coordinates ordered by channel, then offset.

    Args:
        x: input of the convolution.
        conv: gives kernel and padding.
        wide: multiply in float64; else in float32, added in float64.
    """
    channels, (kh, kw) = x.shape[1], conv.kernel_size
    x = x.contiguous() if wide else x.float().contiguous()
    shifted = _correlations_float64(x, kh, kw) if wide else _correlations_float32(x, kh, kw)
    offsets = list(itertools.product(range(kh), range(kw)))
    shift = [[(v[0] - u[0] + kh - 1) * (2 * kw - 1) + v[1] - u[1] + kw - 1 for v in offsets] for u in offsets]
    index = torch.tensor(shift, device=x.device)
    gram = shifted.permute(2, 3, 0, 1).flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
    for images in x.split(_images_of_a_border_sum(x, conv)):
        border = Border(images, conv, wide)
        places: list[int] = []
        terms: list[Tensor] = []
        for (i, u), (j, v) in itertools.combinations_with_replacement(enumerate(offsets), 2):
            if (term := border.term(u, v)) is not None:
                both = {(i, j): term, (j, i): term.T}
                places += [a * len(offsets) + b for a, b in both]
                terms += both.values()
        if terms:
            gram.flatten(0, 1).index_add_(0, torch.tensor(places, device=x.device), torch.stack(terms), alpha=-1)
    return gram.permute(2, 0, 3, 1).reshape(1, channels * kh * kw, channels * kh * kw)


def _correlations_float32(x: Float[Tensor, "n c h w"], kh: int, kw: int) -> Float[Tensor, "c c a b"]:
    """C_s for s in [0, kh - 1] x [-(kw - 1), kw - 1], in one call a float32 sum."""
    size = (x.shape[1], x.shape[1], kh, 2 * kw - 1)
    half = x.new_zeros(size, dtype=torch.float64)
    images, rows = _of_a_sum(x)
    with plain_convolutions(x.device.type):
        for part in x.split(images):
            below = F.pad(part, (0, 0, 0, kh - 1))
            for top in range(0, x.shape[2], rows):
                here = part[:, :, top : top + rows]
                there = below[:, :, top : top + here.shape[2] + kh - 1]
                half += conv2d_weight(there, list(size), here, padding=(0, kw - 1))
    return _with_negative_shifts(half)


def _of_a_sum(x: Float[Tensor, "n c h w"]) -> tuple[int, int]:
    """How many images, and of each how many rows of pixels, float32 adds."""
    height, width = x.shape[2:]
    return max(1, LONGEST_SUM // (height * width)), min(height, max(1, LONGEST_SUM // width))


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
                half[:, :, s, b] += torch.bmm(here.flatten(2), there.flatten(2).mT).sum(0)
    return _with_negative_shifts(half)


def _output_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    left, right, top, bottom = sides(conv)
    kh, kw = conv.kernel_size
    return x.shape[2] + top + bottom - kh + 1, x.shape[3] + left + right - kw + 1


def _images_of_a_border_sum(x: Float[Tensor, "n c h w"], conv: nn.Conv2d) -> int:
    """How many images' rows or columns outside some W_u float32 adds."""
    lines = [len(outside) for axis in _outside_of(x, conv) for outside in axis]
    length = max(size + reach for size, reach in zip(x.shape[2:], conv.kernel_size, strict=True))
    return max(1, LONGEST_SUM // (max(1, *lines) * length))


def _outside_of(x: Float[Tensor, "n c h w"], conv: nn.Conv2d) -> tuple[list[Lines], list[Lines]]:
    """The rows, and the columns, that W_u leaves out, for every offset u along that dimension."""
    left, _, top, _ = sides(conv)
    height, width = _output_size(conv, x)
    rows = [_outside(x.shape[2], height, u - top) for u in range(conv.kernel_size[0])]
    return rows, [_outside(x.shape[3], width, u - left) for u in range(conv.kernel_size[1])]


class Border:
    """What C_{v-u} has and the sum over patches has not, each region and shift summed once.

    Rows and columns that are left out somewhere are copied out of the map once, with zeros behind each: their
    products at a shift are those of two long lines, one of them moved.
    """

    def __init__(self, x: Float[Tensor, "n c h w"], conv: nn.Conv2d, wide: bool) -> None:
        self.x, self.dtype = x, torch.float64 if wide else x.dtype
        self.reach = conv.kernel_size[0] - 1, conv.kernel_size[1] - 1
        self.rows, self.columns = _outside_of(x, conv)
        self.lines: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self.sums: dict[tuple[object, ...], Tensor] = {}

    def term(self, u: tuple[int, int], v: tuple[int, int]) -> Float[Tensor, "c c"] | None:
        """The sum over q outside W_u of x[q] x~[q + v - u]; None where no such pair of pixels is in the map."""
        shift = v[0] - u[0], v[1] - u[1]
        height, width = self.x.shape[2:]
        rows, columns = _staying(self.rows[u[0]], shift[0], height), _staying(self.columns[u[1]], shift[1], width)
        total: Tensor | None = None
        if rows:
            total = self._once((2, rows, shift), lambda: self._sum_along(2, rows, shift[0], shift[1]))
        if columns:
            of_columns = self._once((3, columns, shift), lambda: self._sum_along(3, columns, shift[1], shift[0]))
            total = of_columns if total is None else total + of_columns
        if rows and columns and total is not None:
            total = total - self._once((rows, columns, shift), lambda: self._sum_of(rows, columns, shift))
        return total

    def _once(self, key: tuple[object, ...], find: Callable[[], Tensor]) -> Tensor:
        if key not in self.sums:
            self.sums[key] = find()
        return self.sums[key]

    def _sum_along(self, axis: int, chosen: Lines, across: int, along: int) -> Float[Tensor, "c c"]:
        """Over the pixels q of rows (axis 2) or columns (axis 3), of x[q] x~[q + shift]."""
        return _moved(self._lines(axis, chosen), self._lines(axis, _shifted(chosen, across)), along)

    def _sum_of(self, rows: Lines, columns: Lines, shift: tuple[int, int]) -> Float[Tensor, "c c"]:
        """The same over the pixels at rows x columns."""
        pixels = self._pixels(rows, columns)
        there = self._pixels(_shifted(rows, shift[0]), _shifted(columns, shift[1])) if any(shift) else pixels
        return _moved(pixels, there, 0)

    def _lines(self, axis: int, chosen: Lines) -> Float[Tensor, "c q"]:
        """Rows (axis 2) or columns (axis 3) of all images, one behind the other, each with zeros behind it."""
        key = axis, chosen
        if key not in self.lines:
            part = self.x.index_select(axis, torch.tensor(chosen, device=self.x.device))
            part = part if axis == 2 else part.mT
            self.lines[key] = self._beside(F.pad(part, (0, self.reach[3 - axis])))
        return self.lines[key]

    def _pixels(self, rows: Lines, columns: Lines) -> Float[Tensor, "c q"]:
        near = self.x[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if near.shape[2:] != (len(rows), len(columns)):  # first and last, not between
            near = near[:, :, [q - rows[0] for q in rows]][:, :, :, [q - columns[0] for q in columns]]
        return self._beside(near)

    def _beside(self, part: Float[Tensor, "n c a b"]) -> Float[Tensor, "c q"]:
        """The images side by side, in the dtype of the products."""
        return part.to(self.dtype).flatten(2).transpose(0, 1).flatten(1)


def _staying(chosen: Lines, shift: int, size: int) -> Lines:
    """Of the chosen of `size` pixels, those that `shift` leaves inside."""
    return tuple(q for q in chosen if 0 <= q + shift < size)


def _shifted(chosen: Lines, shift: int) -> Lines:
    return tuple(q + shift for q in chosen)


def _moved(first: Float[Tensor, "c q"], second: Float[Tensor, "c q"], shift: int) -> Float[Tensor, "c c"]:
    """The sum over i of first[i] second[i + shift]."""
    length = first.shape[1] - abs(shift)
    here, there = first.narrow(1, max(0, -shift), length), second.narrow(1, max(0, shift), length)
    return (here @ there.T).double()


def _outside(size: int, reach: int, start: int) -> Lines:
    """Which of `size` pixels are not in start, start + 1, ..., start + reach - 1."""
    return tuple(q for q in range(size) if not start <= q < start + reach)
