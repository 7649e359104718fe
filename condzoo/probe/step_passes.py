"""The forward passes of a training step: which of them are recorded, and over how many samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from condzoo.probe.batches import batch_size
from condzoo.probe.capture import Capture
from condzoo.probe.hooks import Hook, remove, remove_copied
from condzoo.probe.preserving import at_rest
from condzoo.probe.repetitions import within_backward
from condzoo.probe.step_weights import StepWeights
from condzoo.probe.wrappers import in_transform, refuse_replica, refuse_unequal


class StepPasses:
    """Watches a model's forward passes from `attach` to `detach`, and begins each that trains in the capture.

    A call of the model within a recorded one is a part of that pass: the loss is a mean over the outer batch.

    A pass that raises, or whose backward pass does, is forgotten again: a batch that does not fit into memory is tried
    again in parts. Passes that wait for their backward pass together are forgotten together. One that was interrupted
    (KeyboardInterrupt) is forgotten at the end of the step, and those after it are with it.

    Args:
        model: the module that trains.
        capture: what records.
        weights: what sums the weights' gradients.
        mean: whether the loss is a mean over the batch, which its gradients are multiplied by.
        on_first: called before the step's first pass.

    Attributes:
        count: passes recorded.
        samples: in all of them.
    """

    def __init__(
        self, model: nn.Module, capture: Capture, weights: StepWeights, *, mean: bool, on_first: Callable[[], None]
    ) -> None:
        self.model, self.capture, self.weights, self.mean, self.on_first = model, capture, weights, mean, on_first
        capture.on_gradient, weights.reads = self._in_backward, self._reads
        self.count = self.samples = 0
        self._told = False
        # A call of the model each: what forgets it, and whether layers are read again once it is over.
        self._running: list[tuple[Callable[[], None] | None, bool]] = []
        self._waiting: list[Callable[[], None]] = []  # what forgets each pass since a backward pass ended, oldest first
        self._backwards: set[int] = set()  # backward passes that have begun and not ended: they run, or raised
        self._ended = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on, and those of the capture and the weights, after forgetting what passes were seen."""
        self.count = self.samples = 0
        self._told = self._ended = False
        self._running.clear()
        self._waiting.clear()
        self._backwards.clear()
        self._handles.append(self.model.register_forward_pre_hook(Hook(self._before, self.model), with_kwargs=True))
        self.weights.attach()
        self.capture.attach()  # of a network that is a layer itself the call is read before it is over
        self._handles.append(self.model.register_forward_hook(Hook(self._returned, self.model)))
        self._handles.append(self.model.register_forward_hook(Hook(self._over, self.model), always_call=True))

    def detach(self) -> None:
        """Take the hooks off; `count` and `samples` are then final."""
        remove(self._handles)
        remove_copied(self.model)
        if (interrupted := next((forget for forget, _ in self._running if forget), None)) is not None:
            interrupted()
        self._settle()
        self._waiting.clear()  # what could still be undone keeps sums alive

    def begin(self, batch: Any) -> None:
        """A pass over this batch begins; from now on in this step, passes are told and not looked for.

        It takes the place of one that was told and has not run: its batch was skipped.
        """
        if self._told and self.capture.idle:
            self.count, self.samples = self.count - 1, self.samples - self.capture.batch
            del self._waiting[-1:]
        self._told = True
        self._start(batch)

    def _settle(self) -> None:
        """Forget the passes whose backward pass has raised; for when none runs."""
        if self._backwards and self._waiting:
            self._waiting[0]()
        if self._backwards or self._ended:
            self._waiting.clear()
            self._backwards.clear()
            self._ended = False

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        within = self._running != [] and self.capture.recording
        self._running.append((None, self.capture.recording))
        refuse_replica(module)
        refuse_unequal()
        if self._told or at_rest():
            return
        self.capture.recording = module.training and torch.is_grad_enabled() and not in_transform()
        repeated = self.count > 0 and torch._C._current_graph_task_id() != -1  # by checkpointing
        if self.capture.recording and not repeated:
            forget = self._snapshot() if within else self._start([args, kwargs])
            self._running[-1] = forget, self._running[-1][1]

    def _returned(self, *_: Any) -> None:
        if self._running:
            self._running[-1] = None, self._running[-1][1]

    def _over(self, *_: Any) -> None:
        """After a pass that returned, and after one that raised."""
        if not self._running:
            return  # a hook before ours may raise
        forget, self.capture.recording = self._running.pop()
        if forget is not None:
            forget()
            if forget in self._waiting:
                del self._waiting[self._waiting.index(forget) :]

    def _reads(self) -> bool:
        return self.capture.recording or (self.capture.repeats and within_backward())

    def _in_backward(self) -> None:
        """A gradient has come to a layer."""
        self.weights.note_read()
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._backwards:
            self._backwards.add(task)
            Variable._execution_engine.queue_callback(partial(self._backward_ended, task))

    def _backward_ended(self, task: int) -> None:
        self._backwards.discard(task)
        self._ended = not self._backwards

    def _snapshot(self) -> Callable[[], None]:
        return partial(self._undo, self.capture.snapshot(), self.weights.snapshot(), self.count, self.samples)

    def _undo(self, undo: Callable[[], None], undo_weights: Callable[[], None], count: int, samples: int) -> None:
        undo()
        undo_weights()
        self.count, self.samples = count, samples
        self.capture.repeats = count > 0

    def _start(self, batch: Any) -> Callable[[], None]:
        """Begin a pass over this batch; returns what forgets it."""
        self._settle()
        forget = self._snapshot()
        self._waiting.append(forget)
        samples = batch_size(batch)
        self.capture.recording = self.capture.repeats = True
        self.capture.begin(samples, scale=float(samples) if self.mean else 1.0)
        if not self.count:
            self.on_first()
        self.weights.watch_own()
        self.samples += samples
        self.count += 1
        return forget
