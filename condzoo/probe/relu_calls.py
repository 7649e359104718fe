"""The ReLUs of one forward pass as it runs: which call of each this is, and where its units are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.probe.calls import STRIDED, layout
from condzoo.probe.layers import CHANNELS_FIRST
from condzoo.probe.neurons import LinearRange, RunningNeurons, UnitLayout


@dataclass(eq=False)
class ReluCalls:
    """Counts the units of ReLUs, each call in a forward pass by itself: units of its own, under a name of its own."""

    _calls: dict[str, int] = field(default_factory=dict)
    _layout: UnitLayout = field(default_factory=UnitLayout)

    def begin(self) -> None:
        """A forward pass follows."""
        self._calls = {}
        self._layout = UnitLayout()

    def note_layout(self, module: nn.Module, _: Any, h: Any) -> None:
        """Remember where the units are in what follows this layer."""
        if isinstance(h, Tensor) and not h.is_nested:  # one of these has no shape
            alone = isinstance(module, CHANNELS_FIRST) and h.ndim == len(module.kernel_size) + 1
            self._layout = UnitLayout(isinstance(module, CHANNELS_FIRST), tuple(h.shape), alone)

    def add(self, neurons: dict[str, RunningNeurons], name: str, output: Tensor, linear: LinearRange) -> None:
        """Look at the output of the next call of this ReLU; its further ones count as `name` and "#1", "#2", ..."""
        call = self._calls.get(name, 0)
        self._calls = {**self._calls, name: call + 1}  # new: a snapshot keeps the one before
        if not output.numel():
            return
        units = neurons.setdefault(f"{name}#{call}" if call else name, RunningNeurons())
        if (got := layout(output)) != STRIDED:
            units.hidden = f"a ReLU whose output is a {got}: its units are not seen"
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            output = output[None] if self._layout.of_one(tuple(output.shape)) else output
            units.add(output, channels_first=self._layout.units_second(tuple(output.shape)), linear=linear)
