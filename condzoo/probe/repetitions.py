"""Calls under activation checkpointing, which repeats a forward pass within the backward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from condzoo.probe.wrappers import reentrant_checkpoint


class Batch(NamedTuple):
    """Of one forward pass: its samples, and what an output gradient is multiplied by."""

    samples: int
    scale: float
    again: bool = False  # a call whose input was recorded already: a second backward pass over the same checkpoint


@dataclass(eq=False)
class Waiting:
    """What ran in a checkpoint, of one forward pass, and is seen with its gradients only as it is repeated."""

    batch: Batch
    calls: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Calls:
    """The calls of one forward pass that a repetition must not be counted beside.

    Attributes:
        seen: names that were called outside of a repetition.
        waiting: by checkpoint with use_reentrant=True, as long as its graph is there, what it will repeat.
    """

    seen: set[str] = field(default_factory=set)
    waiting: WeakKeyDictionary[Any, Waiting] = field(default_factory=WeakKeyDictionary)

    def __copy__(self) -> Calls:
        """Another one that counts on by itself."""
        waiting = {checkpoint: replace(held, calls=held.calls.copy()) for checkpoint, held in self.waiting.items()}
        return Calls(set(self.seen), WeakKeyDictionary(waiting))

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle is made of: graphs, and what waits for them, are in none."""
        return Calls, (set(self.seen),)

    def waits(self, name: str) -> bool:
        """Whether a call of this layer is still to be repeated."""
        return any(held.calls[name] for held in self.waiting.values())

    def counts(self, name: str, batch: Batch, *, at_once: bool) -> Batch | None:
        """The batch of this call, None if it is not to be recorded, or a repetition of one that was.

        With use_reentrant=True a checkpoint's first forward runs without gradients. What needs none is counted
        `at_once`; a layer waits for the repetition in the backward pass.
        """
        repeated = within_backward()
        if not torch.is_grad_enabled():
            if repeated or (checkpoint := reentrant_checkpoint(repeats=False)) is None:
                return None
            if at_once:
                self.seen.add(name)
                return batch
            self.waiting.setdefault(checkpoint, Waiting(batch)).calls[name] += 1
            return None
        if not repeated:
            self.seen.add(name)
            return batch
        checkpoint = reentrant_checkpoint(repeats=True) if self.waiting and not at_once else None
        held = None if checkpoint is None else self.waiting.get(checkpoint)
        if held is not None and name in held.calls:
            again = not held.calls[name]
            held.calls[name] -= not again
            return held.batch._replace(again=again)
        return None if name in self.seen else batch


def within_backward() -> bool:
    """Whether a backward pass is under way: a forward call within it repeats an earlier one."""
    return torch._C._current_graph_task_id() != -1
