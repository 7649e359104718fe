"""Dying and full units: a ReLU's unit is dying if it is 0, full if it is positive, on every row seen.

A dying unit passes no gradient; a full one is linear, so a layer of them adds no depth
(arXiv:2002.10801, appendix, Fig. XIII). A unit is a channel of [n, c, h, w] and a coordinate of
[n, d] and [n, t, d].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

RELUS = (nn.ReLU, nn.ReLU6, nn.Threshold)

FIRST_LOOK = 8  # samples looked at in full; afterwards only the units still undecided


@dataclass(frozen=True)
class Neurons:
    """How many units of one ReLU are dying and full.

    Attributes:
        units: all units.
        dying: those that were 0 on every row; full: those that were positive on every row.
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
    """Which units of one ReLU have been positive so far, and which have been zero."""

    been_positive: Tensor | None = None
    been_zero: Tensor | None = None
    rows: int = 0

    def add(self, output: Tensor, *, channels_first: bool) -> None:
        """Look at one output of the ReLU: [n, u, ...] if channels_first, else [..., u]."""
        units = output.detach().movedim(1 if channels_first else -1, 0)
        self.rows += output.numel() // units.shape[0]
        if self.been_positive is None or self.been_zero is None:
            self.been_positive = torch.zeros(units.shape[0], dtype=torch.bool, device=output.device)
            self.been_zero = self.been_positive.clone()
        self._look(units[:, :FIRST_LOOK])
        open_units = ~(self.been_positive & self.been_zero)
        if units.shape[1] > FIRST_LOOK and bool(open_units.any()):
            self._look(units[:, FIRST_LOOK:], open_units.nonzero().flatten())

    def _look(self, units: Tensor, which: Tensor | None = None) -> None:
        assert self.been_positive is not None
        assert self.been_zero is not None
        seen = units if which is None else units[which]
        positive = seen > 0
        not_zero = ~(seen <= 0)  # NaN too: a unit that is NaN is neither dying nor full
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
