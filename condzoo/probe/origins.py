"""Where NaN or Inf came into a forward pass, known once somebody has read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

SMALL = 1 << 18  # numbers in an output up to which a training step reads it once more


@dataclass(frozen=True, eq=False)
class Output:
    """A layer's output, kept by autograd or the network, or gone; and what it was when the layer gave it.

    Attributes:
        name: the layer's.
        reference: to it.
        seen: numbers that are finite where all of it was; None: it was not looked at.
    """

    name: str
    reference: TensorWeakRef
    seen: Tensor | None

    def is_finite(self) -> bool:
        """Whether it holds no NaN or Inf, as far as is known."""
        known = self.reference() if self.seen is None else self.seen
        return known is None or bool(torch.isfinite(known).all())


@dataclass(eq=False)
class Origin:
    """The first layer whose output holds NaN or Inf, on whatever branch.

    What comes next may hide it (a ReLU, a softmax), so outputs are looked at as they come; large ones of a training
    step only once a layer's input, the last output or a gradient shows some.

    Attributes:
        name: of the layer; None as long as there was none.
    """

    name: str | None = None
    _latest: Tensor | None = None  # the last output, where it was not looked at
    _outputs: list[Output] = field(default_factory=list)

    def passed(self, name: str, h: Tensor, *, whole: bool) -> None:
        """A layer gave an output; whole: look at it however large it is."""
        if self.name is not None:
            return
        values = h.detach()
        seen = _extremes(values) if h.numel() > 0 and (whole or h.numel() <= SMALL) else None
        self._outputs = [*self._outputs, Output(name, TensorWeakRef(h), seen)]  # new: a snapshot keeps the one before
        self._latest = values if seen is None else None

    def next_pass(self) -> None:
        """Another forward pass begins."""
        self.find()
        self._latest, self._outputs = None, []

    def find(self, reader: str | None = None, *, everywhere: bool = False) -> None:
        """Name the layer: the first whose output holds it, else the one that reads it.

        Args:
            reader: a layer whose input holds it.
            everywhere: look at all outputs although neither a reader nor one that was looked at shows any.
        """
        if self.name is not None:
            return
        last = self._latest is not None and not bool(torch.isfinite(self._latest).all())
        shown = last or everywhere or reader is not None
        if shown or not all(output.is_finite() for output in self._outputs if output.seen is not None):
            made = [output.name for output in self._outputs if not output.is_finite()]
            self.name = next(iter(made + [output.name for output in self._outputs[-1:] if last]), reader)


def _extremes(h: Tensor) -> Tensor:
    """Numbers that are finite if h is, on its device and without waiting for it.

    On a CPU a sum is quickest, and waits for nothing; one that finite numbers overflow says nothing.
    """
    with torch._C.DisableTorchFunction():  # modes, of a user's or `function_calls`, see the network alone
        if h.device.type == "cpu" and math.isfinite(total := h.sum()):
            return total
        return torch.stack(torch.aminmax(h))
