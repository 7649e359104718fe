"""Hooks that work on their own module alone: a copy of a network is not the one that is probed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

NOT_SCRIPTED = (
    "torch.jit.script compiles a module's hooks, too, and cannot compile those of a condzoo.Probe; script the model "
    "in a step that is not due (probe.due says which is), or outside of `with Probe(...)`"
)
# Whether torch.export records the network: nothing but the network belongs into its graph. Older torch does not tell it
# from torch.compile, which has no part in a step that is due.
_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class Hook:
    """A function as a hook of one module.

    It does nothing in a deep copy or pickle of that module, where it has none, nor on another module that is given its
    hooks, as quantization-aware training gives those of a layer to what takes its place.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module | None = None) -> None:
        self.function, self._module = function, None if module is None else ref(module)

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if _exporting() or not self.is_of(module):
            return None
        return apart(self.function, module, *args, **kwargs)

    def is_of(self, module: nn.Module) -> bool:
        """Whether this module is the hook's own, or a copy of it that nn.DataParallel runs, which is to be refused."""
        own = None if self._module is None else self._module()
        return own is module or getattr(module, "_is_replica", False)

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return Hook, (_nothing,)

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks first of a hook, which it would have to compile."""
        raise AttributeError(NOT_SCRIPTED)


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


def remove_copied(model: nn.Module) -> None:
    """Take off the hooks that modules of a network were given from others, which no handle removes."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and not hook.is_of(module)]:
                    del hooks[key]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The hook of a copy."""
