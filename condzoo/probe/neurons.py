"""Dying and full units: a ReLU's unit is dying if it is 0, full if it is positive, on every row seen.

A dying unit passes no gradient; a full one is linear, so a layer of them adds no depth
(arXiv:2002.10801, appendix, Fig. XIII). A unit is a channel of [n, c, h, w] and a coordinate of
[n, d] and [n, t, d]. ReLU6 is flat at 6 as well, so there a unit is dying if it is 0 or 6, and full if it
is strictly between, on every row; nn.Threshold is flat at and under its threshold, where its output is the
value that it puts there. Activations that are flat nowhere (LeakyReLU, PReLU, ELU, GELU, SiLU, ...) have no
dying units and are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

RELUS = (nn.ReLU, nn.ReLU6, nn.Threshold)
CHANGING = "a ReLU whose number of units differs from call to call"  # as of one over tokens

FIRST = 1 << 16  # elements looked at first: enough to decide nearly all units, and quick to read
GROWTH = 8  # then so many times more, and each time only the units still undecided


class LinearRange(NamedTuple):
    """The outputs at which a ReLU is linear: between low and high, borders excluded, but for the value `flat`."""

    low: float
    high: float
    flat: float | None = None


OF_RELU, OF_RELU6 = LinearRange(0.0, math.inf), LinearRange(0.0, 6.0)


def linear_range(module: nn.Module, dtype: torch.dtype) -> LinearRange:
    """The outputs at which a ReLU is linear; at all others it is flat.

    A threshold, and the value in its place, are what they round to in the outputs' dtype.
    """
    if isinstance(module, nn.Threshold):
        low, value = torch.tensor([module.threshold, module.value], dtype=dtype, device="cpu").tolist()
        return LinearRange(low, math.inf, value if value > low else None)
    return OF_RELU6 if isinstance(module, nn.ReLU6) else OF_RELU


@dataclass(frozen=True)
class Neurons:
    """How many units of one ReLU are dying and full.

    Attributes:
        units: all units.
        dying: those that were 0 (flat) on every row; full: those that were positive (linear) on every row.
        rows: rows seen.
    """

    units: int
    dying: int
    full: int
    rows: int

    @property
    def dying_share(self) -> float:
        """dying / units, in [0, 1]."""
        return self.dying / self.units

    @property
    def full_share(self) -> float:
        """full / units, in [0, 1]."""
        return self.full / self.units


@dataclass(frozen=True)
class UnitLayout:
    """Where a ReLU's units are, by the layer before it.

    Attributes:
        channels_first: that layer puts its units along dimension 1, a linear layer along the last.
        shape: of that layer's output.
        alone: that output is of one sample, without a batch dimension, as torch's convolutions allow.
    """

    channels_first: bool = False
    shape: tuple[int, ...] = ()
    alone: bool = False

    def of_one(self, shape: tuple[int, ...]) -> bool:
        """Whether an output, too, is of one sample without a batch dimension."""
        return self.alone and len(shape) == len(self.shape)

    def units_second(self, shape: tuple[int, ...]) -> bool:
        """Whether an output's units are along dimension 1.

        Not those of [n, t, d] and [n, h, w, d] after a linear layer; but where that layer's units [n, d] were the
        gates of channels [n, d, t], or its output was transposed.
        """
        if self.channels_first or len(shape) == 2:
            return True
        if len(shape) == 3:
            width = self.shape[-1:]
            return shape[1:2] == width != shape[2:] and shape[:-1] != self.shape[:-1]
        return shape != self.shape


@dataclass(eq=False)
class RunningNeurons:
    """Which units of one ReLU have been positive (linear) so far, and which have been zero (flat).

    `hidden`: why they cannot be counted, if so.
    """

    been_positive: Bool[np.ndarray, " u"] | None = None
    been_zero: Bool[np.ndarray, " u"] | None = None
    rows: int = 0
    hidden: str | None = None

    def add(self, output: Tensor, *, channels_first: bool, linear: LinearRange = OF_RELU) -> None:
        """Look at one output of the ReLU: [n, u, ...] if channels_first, else [..., u]."""
        units = output.detach() if output.ndim > 1 else output.detach()[None]
        axis = 1 if channels_first else units.ndim - 1
        count = units.shape[axis]
        self.rows += units.numel() // count
        if self.been_positive is None or self.been_zero is None:
            self.been_positive = self.been_zero = np.zeros(count, dtype=bool)
        if count != self.been_positive.size:
            self.hidden = CHANGING
        if self.hidden is not None:
            return
        start, stop = 0, max(1, min(len(units), FIRST * len(units) // max(1, units.numel())))
        while start < units.shape[0] and not (decided := self.been_positive & self.been_zero).all():
            part = units[start:stop]
            if decided.any():
                part = part.index_select(axis, torch.from_numpy((~decided).nonzero()[0]).to(part.device))
            positive, zero = np.zeros((2, count), dtype=bool)
            positive[~decided], zero[~decided] = _seen(part, axis, linear)
            self.been_positive, self.been_zero = self.been_positive | positive, self.been_zero | zero
            start, stop = stop, GROWTH * stop

    def count(self) -> Neurons:
        """The counts so far."""
        assert self.been_positive is not None
        assert self.been_zero is not None
        return Neurons(
            units=self.been_positive.size,
            dying=int((~self.been_positive).sum()),
            full=int((~self.been_zero).sum()),
            rows=self.rows,
        )


def counts(running: Mapping[str, RunningNeurons]) -> tuple[dict[str, Neurons], dict[str, str]]:
    """Dying and full units by ReLU, and the reason by ReLU that cannot be counted."""
    counted = {name: units.count() for name, units in running.items() if units.hidden is None}
    return counted, {name: units.hidden for name, units in running.items() if units.hidden is not None}


def _seen(units: Tensor, axis: int, linear: LinearRange) -> tuple[Bool[np.ndarray, " u"], Bool[np.ndarray, " u"]]:
    """Which units were linear on some row, and which flat.

    NaN counts as both: such a unit is neither dying nor full.
    """
    if not units.numel():
        none = np.zeros(units.shape[axis], dtype=bool)
        return none, none
    others = tuple(i for i in range(units.ndim) if i != axis)
    low, high, flat = linear
    if flat is not None:
        units = units.masked_fill(units == flat, -math.inf)
    largest, smallest = _as_numpy(torch.stack((units.amax(others), units.amin(others))))
    if high == math.inf:
        return ~(largest <= low), ~(smallest > low)
    inside = ~(units <= low) & ~(units >= high)
    return _as_numpy(inside.any(others)), ~(smallest > low) | ~(largest < high)


def _as_numpy(values: Tensor) -> np.ndarray:
    """The values of few units, from a device in one transfer; numpy's operations on so few cost least."""
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
