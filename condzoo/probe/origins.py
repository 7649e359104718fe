"""Where NaN or Inf came into a forward pass, known once somebody has read it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


@dataclass(eq=False)
class Origin:
    """The first layer whose output holds NaN or Inf, on whatever branch; one check a pass as long as there is none.

    Attributes:
        name: of the layer; None as long as there was none.
    """

    name: str | None = None
    _latest: tuple[str, Tensor] | None = None
    _outputs: list[tuple[str, TensorWeakRef]] = field(default_factory=list)  # kept by autograd or the network, or gone

    def passed(self, name: str, h: Tensor) -> None:
        """A layer gave an output."""
        self._latest = name, h.detach()
        self._outputs.append((name, TensorWeakRef(h)))

    def next_pass(self) -> None:
        """Another forward pass begins."""
        self.find()
        self._latest, self._outputs = None, []

    def find(self, reader: str | None = None, *, everywhere: bool = False) -> None:
        """Name the layer: the first whose output holds it, else the one that reads it.

        Args:
            reader: a layer whose input holds it.
            everywhere: look at all outputs although neither a reader nor the latest layer shows any.
        """
        if self.name is not None:
            return
        made = [] if self._latest is None else _not_finite([self._latest])
        if made or everywhere or reader is not None:
            kept = [(name, h) for name, reference in self._outputs if (h := reference()) is not None]
            made = _not_finite(kept) + made
        self.name = next(iter(made), reader)


def _not_finite(outputs: list[tuple[str, Tensor]]) -> list[str]:
    return [name for name, h in outputs if not torch.isfinite(h).all()]
