"""Hooks that stay behind when their module is copied or pickled: a copy of a network is not the one that is probed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle


class Hook:
    """A function as a hook; in a deep copy or pickle of the module it does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return apart(self.function, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return Hook, (_nothing,)


@contextmanager
def output_sizes(modules: Iterable[nn.Module]) -> Iterator[list[int]]:
    """How many numbers are in the output of each call of the modules, in the forward passes inside."""
    counts: list[int] = []

    def note(module: nn.Module, args: Any, h: Any) -> None:
        counts.append(h.numel() if isinstance(h, Tensor) else 0)

    scripted = torch.jit.ScriptModule  # takes no hooks
    handles = [module.register_forward_hook(note) for module in modules if not isinstance(module, scripted)]
    try:
        yield counts
    finally:
        remove(handles)


def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function outside of the modes that see every operation of the network around.

    Selective checkpointing numbers the products of a forward pass in such a mode; ones that are not repeated in the
    backward pass would shift the numbers of those that follow.
    """
    if not torch._C._len_torch_dispatch_stack():
        return function(*args, **kwargs)
    with _disable_current_modes():
        return function(*args, **kwargs)


def remove(handles: list[RemovableHandle]) -> None:
    """Take these hooks off, and empty the list."""
    while handles:
        handles.pop().remove()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The hook of a copy."""
