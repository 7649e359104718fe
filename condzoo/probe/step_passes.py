"""The forward passes of a training step: which of them are recorded, and over how many samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from condzoo.probe.batches import batch_size
from condzoo.probe.capture import Capture
from condzoo.probe.hooks import Hook
from condzoo.probe.preserving import at_rest


class StepPasses:
    """Watches a model's forward passes from `attach` to `detach`, and begins each that trains in the capture.

    One that raises is forgotten again: a batch that does not fit into memory is tried again in parts.

    Args:
        model: the module that trains.
        capture: what records.
        mean: whether the loss is a mean over the batch, which its gradients are multiplied by.
        on_first: called before the step's first pass.

    Attributes:
        count: passes recorded.
        samples: in all of them.
    """

    def __init__(self, model: nn.Module, capture: Capture, *, mean: bool, on_first: Callable[[], None]) -> None:
        self.model, self.capture, self.mean, self.on_first = model, capture, mean, on_first
        self.count = self.samples = 0
        self._told = False
        self._running: list[Callable[[], None] | None] = []  # a call of the model each: what forgets it
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on, after forgetting all that was seen."""
        self.count = self.samples = 0
        self._told = False
        self._running.clear()
        self._handles.append(self.model.register_forward_pre_hook(Hook(self._before), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(Hook(self._returned)))
        self._handles.append(self.model.register_forward_hook(Hook(self._over), always_call=True))

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def begin(self, batch: Any) -> None:
        """A pass over this batch begins; from now on in this step, passes are told and not looked for."""
        self._told = True
        self._start(batch)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(None)
        if self._told or at_rest():
            return
        self.capture.recording = module.training and torch.is_grad_enabled()
        repeated = self.count > 0 and torch._C._current_graph_task_id() != -1  # by checkpointing
        if self.capture.recording and not repeated:
            self._running[-1] = self._snapshot()
            self._start([args, kwargs])

    def _returned(self, *_: Any) -> None:
        if self._running:
            self._running[-1] = None

    def _over(self, *_: Any) -> None:
        """After a pass that returned, and after one that raised."""
        forget = self._running.pop() if self._running else None  # a hook before ours may raise
        if forget is not None:
            forget()

    def _snapshot(self) -> Callable[[], None]:
        undo, count, samples = self.capture.snapshot(), self.count, self.samples

        def forget() -> None:
            undo()
            self.count, self.samples = count, samples

        return forget

    def _start(self, batch: Any) -> None:
        samples = batch_size(batch)
        self.capture.recording = True
        self.capture.begin(samples, scale=float(samples) if self.mean else 1.0)
        if not self.count:
            self.on_first()
        self.samples += samples
        self.count += 1
