"""Calls under activation checkpointing, which repeats a forward pass within the backward pass."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from condzoo.probe.wrappers import in_reentrant_checkpoint

MIXED = (
    "forward passes of several sizes waited together for their backward passes under checkpoints with use_reentrant="
    "True, which do not say whose pass they repeat"
)


class Batch(NamedTuple):
    """Of one forward pass: its samples, and what an output gradient is multiplied by."""

    samples: int
    scale: float


@dataclass(eq=False)
class Calls:
    """The calls of one forward pass that a repetition must not be counted beside.

    Attributes:
        seen: names that were called outside of a repetition.
        waiting: by name, the batches of calls that only their repetition shows, with its gradients.
    """

    seen: set[str] = field(default_factory=set)
    waiting: defaultdict[str, list[Batch]] = field(default_factory=lambda: defaultdict(list))

    def __copy__(self) -> Calls:
        """Another one that counts on by itself."""
        return Calls(set(self.seen), defaultdict(list, {name: list(held) for name, held in self.waiting.items()}))

    def mixed(self, name: str) -> bool:
        """Whether a repetition of this layer may be of batches of several sizes; nothing says of which."""
        return within_backward() and len(set(self.waiting[name])) > 1

    def counts(self, name: str, batch: Batch, *, at_once: bool) -> Batch | None:
        """The batch of this call, None if it is not to be recorded, or a repetition of one that was.

        With use_reentrant=True a checkpoint's first forward runs without gradients. What needs none is counted
        `at_once`; a layer waits for the repetition in the backward pass.
        """
        repeated = within_backward()
        if not torch.is_grad_enabled():
            if repeated or not in_reentrant_checkpoint():
                return None
            if at_once:
                self.seen.add(name)
                return batch
            self.waiting[name].append(batch)
            return None
        if not repeated:
            self.seen.add(name)
            return batch
        if self.waiting[name]:
            return self.waiting[name].pop()
        return None if name in self.seen else batch


def within_backward() -> bool:
    """Whether a backward pass is under way: a forward call within it repeats an earlier one."""
    return torch._C._current_graph_task_id() != -1
