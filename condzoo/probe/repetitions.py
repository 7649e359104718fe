"""Calls under activation checkpointing, which repeats a forward pass within the backward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from condzoo.probe.wrappers import in_reentrant_checkpoint


@dataclass(eq=False)
class Calls:
    """The calls of one forward pass that a repetition must not be counted beside.

    Attributes:
        seen: names that were called outside of a repetition.
        waiting: calls by name that only their repetition shows, with its gradients.
    """

    seen: set[str] = field(default_factory=set)
    waiting: Counter[str] = field(default_factory=Counter)

    def __copy__(self) -> Calls:
        """Another one that counts on by itself."""
        return Calls(set(self.seen), Counter(self.waiting))

    def counts(self, name: str, *, at_once: bool) -> bool:
        """Whether this call is to be recorded, and not a repetition of one that was.

        With use_reentrant=True a checkpoint's first forward runs without gradients. What needs none is counted
        `at_once`; a layer waits for the repetition in the backward pass.
        """
        repeated = within_backward()
        if not torch.is_grad_enabled():
            if repeated or not in_reentrant_checkpoint():
                return False
            (self.seen if at_once else self.waiting).update((name,))
            return at_once
        if not repeated:
            self.seen.add(name)
            return True
        waited = self.waiting[name] > 0
        self.waiting[name] -= waited
        return waited or name not in self.seen


def within_backward() -> bool:
    """Whether a backward pass is under way: a forward call within it repeats an earlier one."""
    return torch._C._current_graph_task_id() != -1
