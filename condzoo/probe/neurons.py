"""Dying and full units: a ReLU's unit is dying if it is 0, full if it is positive, on every row seen.

A dying unit passes no gradient; a full one is linear, so a layer of them adds no depth
(arXiv:2002.10801, appendix, Fig. XIII). A unit is a channel of [n, c, h, w] and a coordinate of
[n, d] and [n, t, d]. ReLU6 is flat at 6 as well, so there a unit is dying if it is 0 or 6, and full if it
is strictly between, on every row; nn.Threshold is flat at and under its threshold. Activations that are flat
nowhere (LeakyReLU, PReLU, ELU, GELU, SiLU, ...) have no dying units and are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RELUS = (nn.ReLU, nn.ReLU6, nn.Threshold)
OF_RELU, OF_RELU6 = (0.0, math.inf), (0.0, 6.0)

FIRST = 1 << 16  # elements looked at first: enough to decide nearly all units, and quick to read
GROWTH = 8  # then so many times more, and each time only the units still undecided


def linear_range(module: nn.Module) -> tuple[float, float]:
    """The outputs, borders excluded, at which a ReLU is linear; at all others it is flat."""
    if isinstance(module, nn.Threshold):
        return module.threshold, math.inf
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


@dataclass(eq=False)
class RunningNeurons:
    """Which units of one ReLU have been positive (linear) so far, and which have been zero (flat).

    `changing`: outputs had different numbers of units, as of a ReLU over tokens; then there is nothing to count.
    """

    been_positive: Tensor | None = None
    been_zero: Tensor | None = None
    rows: int = 0
    changing: bool = False

    def add(self, output: Tensor, *, channels_first: bool, linear: tuple[float, float] = OF_RELU) -> None:
        """Look at one output of the ReLU: [n, u, ...] if channels_first, else [..., u]."""
        units = output.detach() if output.ndim > 1 else output.detach()[None]
        axis = 1 if channels_first else units.ndim - 1
        count = units.shape[axis]
        self.rows += units.numel() // count
        if self.been_positive is None or self.been_zero is None:
            self.been_positive = self.been_zero = torch.zeros(count, dtype=torch.bool, device=units.device)
        self.changing = self.changing or count != self.been_positive.numel()
        if self.changing:
            return
        start, stop = 0, max(1, min(len(units), FIRST * len(units) // max(1, units.numel())))
        while start < units.shape[0] and not bool((decided := self.been_positive & self.been_zero).all()):
            part, which = units[start:stop], None
            if start and bool(decided.any()):
                which = (~decided).nonzero().flatten()
                part = part.index_select(axis, which)
            self._look(part, which, axis, linear)
            start, stop = stop, GROWTH * stop

    def _look(self, units: Tensor, which: Tensor | None, axis: int, linear: tuple[float, float]) -> None:
        """NaN counts as positive and as zero: such a unit is neither dying nor full."""
        assert self.been_positive is not None
        assert self.been_zero is not None
        others = tuple(i for i in range(units.ndim) if i != axis)
        if not units.numel():
            return
        low, high = linear
        largest, smallest = units.amax(others), units.amin(others)
        if high < math.inf:
            positive = (~(units <= low) & ~(units >= high)).any(others)
            zero = ~(smallest > low) | ~(largest < high)
        else:
            positive, zero = ~(largest <= low), ~(smallest > low)
        if which is None:
            self.been_positive, self.been_zero = self.been_positive | positive, self.been_zero | zero
        else:
            self.been_positive[which] |= positive
            self.been_zero[which] |= zero

    def count(self) -> Neurons:
        """The counts so far."""
        assert self.been_positive is not None
        assert self.been_zero is not None
        return Neurons(
            units=self.been_positive.numel(),
            dying=int((~self.been_positive).sum()),
            full=int((~self.been_zero).sum()),
            rows=self.rows,
        )
