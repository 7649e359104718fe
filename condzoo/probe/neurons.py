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

FIRST_LOOK = 8  # samples looked at in full; afterwards only the units still undecided


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
    """Which units of one ReLU have been positive (linear) so far, and which have been zero (flat)."""

    been_positive: Tensor | None = None
    been_zero: Tensor | None = None
    rows: int = 0

    def add(self, output: Tensor, *, channels_first: bool, linear: tuple[float, float] = OF_RELU) -> None:
        """Look at one output of the ReLU: [n, u, ...] if channels_first, else [..., u]."""
        units = output.detach().movedim(1 if channels_first else -1, 0)
        self.rows += output.numel() // units.shape[0]
        if self.been_positive is None or self.been_zero is None:
            self.been_positive = torch.zeros(units.shape[0], dtype=torch.bool, device=output.device)
            self.been_zero = self.been_positive.clone()
        self._look(units[:, :FIRST_LOOK], linear)
        open_units = ~(self.been_positive & self.been_zero)
        if units.shape[1] > FIRST_LOOK and bool(open_units.any()):
            self._look(units[:, FIRST_LOOK:], linear, open_units.nonzero().flatten())

    def _look(self, units: Tensor, linear: tuple[float, float], which: Tensor | None = None) -> None:
        assert self.been_positive is not None
        assert self.been_zero is not None
        seen = units if which is None else units[which]
        low, high = linear
        positive = seen > low
        not_zero = ~(seen <= low)  # NaN too: a unit that is NaN is neither dying nor full
        if high < math.inf:
            positive &= seen < high
            not_zero &= ~(seen >= high)
        over = tuple(range(1, units.ndim))
        index = slice(None) if which is None else which
        self.been_positive[index] |= not_zero.any(over) if over else not_zero
        self.been_zero[index] |= ~(positive.all(over) if over else positive)

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
