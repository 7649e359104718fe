"""Hooks that stay behind when their module is copied or pickled: a copy of a network is not the one that is probed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


class Hook:
    """A function as a hook; in a deep copy or pickle of the module it does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return Hook, (_nothing,)


def remove(handles: list[RemovableHandle]) -> None:
    """Take these hooks off, and empty the list."""
    while handles:
        handles.pop().remove()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The hook of a copy."""
