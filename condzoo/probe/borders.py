"""What a patch moment has less than the cross-correlations of its map: sums over the pixels at the map's borders.

    B[(c, u), (c', v)] = sum_{q not in W_u} x_c[q] x~_c'[q + v - u]

for patch offsets u and v, with x~ the map x with zeros around it and W_u the pixels that offset u reaches from some
output position. Outside W_u are whole rows R_u and whole columns Q_u: B is the sum over R_u, plus that over Q_u, less
that over the pixels in both. Each of them is one of a few sums over a single row, column or pixel, which are taken
once; which of them make up which block depends on sizes alone.
Shapes: n images, c channels, h x w pixels, kernel kh x kw, k = kh * kw.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Pixel = tuple[int, int]


LONGEST_SUM = 1 << 13  # pixels that a product of lines, or a convolution, adds in float32
CANCELLED = 2.0**-10  # of a channel's largest sum of squares: less of it may be round-off


class Along(NamedTuple):
    """The sum over row (axis 2) or column (axis 3) `line` of x[q] x~[q'], q' in line `other`, `shift` pixels on."""

    axis: int
    line: int
    other: int
    shift: int


class At(NamedTuple):
    """x[q] x~[q'] of two pixels."""

    pixel: Pixel
    other: Pixel


class Geometry(NamedTuple):
    """Pixels of the map, positions of the output, the kernel, and how much is padded on top and on the left."""

    size: Pixel
    output: Pixel
    kernel: Pixel
    start: Pixel


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sums to take, and in which blocks they are.

    Attributes:
        lines: by axis and shift, pairs of lines; those of a line with itself are taken for shifts >= 0.
        pixels: pairs of pixels.
        added, left_out: (blocks, sums) that are added to B and subtracted from it; block i * k + j is (u_i, v_j). A sum
            past the last is the transpose of one: sum number m + s is that of sum s of m.
    """

    lines: dict[tuple[int, int], list[tuple[int, int]]]
    pixels: list[At]
    added: tuple[list[int], list[int]]
    left_out: tuple[list[int], list[int]]


def subtract_border(gram: Float[Tensor, "kk c c"], x: Float[Tensor, "n c h w"], geometry: Geometry, wide: bool) -> None:
    """Subtract B from all k * k blocks, in place; coordinates that are 0 in every patch are then 0 exactly.

    Args:
        gram: block i * k + j is (u_i, v_j), offsets row by row; float64.
        x: the map.
        geometry: of the convolution on it.
        wide: multiply in float64; else in float32, added in float64.
    """
    plan = _plan(geometry)
    if not plan.added[0]:
        return
    x = x.double() if wide else x
    length = max(geometry.size) + max(geometry.kernel)
    parts = [_sums(images, plan, geometry) for images in x.split(max(1, LONGEST_SUM // length))]
    sums = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    sums = torch.cat([sums, sums.mT])
    for (blocks, which), sign in ((plan.added, -1), (plan.left_out, 1)):
        if blocks:
            gram.index_add_(0, _index(blocks, gram), sums.index_select(0, _index(which, gram)), alpha=sign)
    _clear_zeros(gram, x, geometry)


def _clear_zeros(gram: Float[Tensor, "kk c c"], x: Float[Tensor, "n c h w"], geometry: Geometry) -> None:
    """Of a channel that is 0 but at a border, the sums of the offsets that do not reach it leave round-off."""
    k = math.prod(geometry.kernel)
    squares = gram[:: k + 1].diagonal(dim1=1, dim2=2)
    if not bool((squares < CANCELLED * squares.amax(0)).any()):
        return
    nonzero, reached = (x != 0).any(0), []
    for u in itertools.product(*map(range, geometry.kernel)):
        rows, columns = (
            slice(max(0, u[d] - geometry.start[d]), max(0, u[d] - geometry.start[d] + geometry.output[d]))
            for d in range(2)
        )
        reached.append(nonzero[:, rows, columns].flatten(1).any(1))
    alive = torch.stack(reached)
    gram.unflatten(0, (k, k)).masked_fill_(~(alive[:, None, :, None] & alive[:, None]), 0.0)


def _index(numbers: list[int], like: Tensor) -> Int64[Tensor, " m"]:
    return torch.tensor(numbers, device=like.device)


def _sums(x: Float[Tensor, "n c h w"], plan: Plan, geometry: Geometry) -> Float[Tensor, "m c c"]:
    """All sums of the plan, in its order, in float64."""
    lines = {axis: _Lines(x, axis, geometry.kernel[3 - axis] - 1) for axis in (2, 3)}
    products = [lines[axis].products(pairs, shift) for (axis, shift), pairs in plan.lines.items()]
    if plan.pixels:
        flat, width = x.flatten(2), x.shape[3]
        ends = [[q[0] * width + q[1] for q in pixels] for pixels in zip(*plan.pixels, strict=True)]
        here = flat.index_select(2, _index(ends[0], x)).permute(2, 1, 0)
        there = here if ends[0] == ends[1] else flat.index_select(2, _index(ends[1], x)).permute(2, 1, 0)
        products.append(torch.bmm(here, there.mT))
    return torch.cat(products).double()


class _Lines:
    """Single rows (axis 2) or columns (axis 3) of all images, one image behind the other with zeros between."""

    def __init__(self, x: Float[Tensor, "n c h w"], axis: int, reach: int) -> None:
        self.x, self.axis, self.reach = x, axis, reach
        self.found: dict[tuple[int, ...], Tensor] = {}

    def products(self, pairs: list[tuple[int, int]], shift: int) -> Float[Tensor, "m c c"]:
        """The sums over i of first[i] second[i + shift]."""
        first, second = (self._stacked(lines) for lines in zip(*pairs, strict=True))
        length = first.shape[2] - abs(shift)
        return torch.bmm(first.narrow(2, max(0, -shift), length), second.narrow(2, max(0, shift), length).mT)

    def _stacked(self, lines: tuple[int, ...]) -> Float[Tensor, "m c q"]:
        if lines not in self.found:
            images, channels = self.x.shape[:2]
            size = self.x.shape[5 - self.axis]
            stacked = self.x.new_zeros((len(lines), channels, images, size + self.reach))
            for place, line in zip(stacked, lines, strict=True):
                place[:, :, :size] = self.x.select(self.axis, line).transpose(0, 1)
            self.found[lines] = stacked.flatten(2)
        return self.found[lines]


@lru_cache(maxsize=256)
def _plan(geometry: Geometry) -> Plan:
    offsets = list(itertools.product(*map(range, geometry.kernel)))
    outside = [_outside(*of) for of in zip(*geometry, strict=True)]
    blocks: dict[bool, list[tuple[int, Along | At, bool]]] = {True: [], False: []}
    for (i, u), (j, v) in itertools.combinations_with_replacement(enumerate(offsets), 2):
        shift = v[0] - u[0], v[1] - u[1]
        rows, columns = ([q for q in outside[d][u[d]] if 0 <= q + shift[d] < geometry.size[d]] for d in range(2))
        terms: list[tuple[bool, Along | At]] = [(True, Along(2, q, q + shift[0], shift[1])) for q in rows]
        terms += [(True, Along(3, q, q + shift[1], shift[0])) for q in columns]
        terms += [(False, At((r, q), (r + shift[0], q + shift[1]))) for r in rows for q in columns]
        for is_added, term in terms:
            turned = isinstance(term, Along) and term.line == term.other and term.shift < 0
            term = term._replace(shift=-term.shift) if isinstance(term, Along) and turned else term
            blocks[is_added].append((i * len(offsets) + j, term, turned))
            if i < j:  # the block across is the transpose
                blocks[is_added].append((j * len(offsets) + i, term, not turned))
    lines: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    sums = list(dict.fromkeys(term for part in blocks.values() for _, term, _ in part))
    for term in sums:
        if isinstance(term, Along):
            lines[term.axis, term.shift].append((term.line, term.other))
    pixels = [term for term in sums if isinstance(term, At)]
    order: list[Along | At] = [Along(axis, *pair, shift) for (axis, shift), pairs in lines.items() for pair in pairs]
    number = {term: i for i, term in enumerate([*order, *pixels])}
    added, left_out = (
        ([block for block, _, _ in part], [number[term] + len(number) * turned for _, term, turned in part])
        for part in blocks.values()
    )
    return Plan(dict(lines), pixels, added, left_out)


def _outside(size: int, output: int, kernel: int, start: int) -> list[list[int]]:
    """For each offset u along a dimension, which pixels are not in u - start, ..., u - start + output - 1."""
    return [[q for q in range(size) if not u <= q + start < u + output] for u in range(kernel)]
