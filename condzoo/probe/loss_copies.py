"""The loss beside a copy of the model, in the copy's dtype or on its device.

A loss may use the model itself: its weights' norm, its output elsewhere. One that is a module, or a method of the
model's, gets the copy. What a function closes over cannot be replaced; its part of the gradient would end in the
model, not in the copy, and be lost without a word: it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.probe.batches import in_float64, mapped, on_device
from condzoo.probe.hooks import Hook
from condzoo.probe.label_models import distribution_of
from condzoo.probe.losses import name_of, reduction_of

Move = Callable[[Any], Any]


def wide(value: Any) -> Any:
    """A module or a batch in float64."""
    return value.double() if isinstance(value, nn.Module) else in_float64(value)


def on(device: torch.device) -> Move:
    """What brings a module or a batch onto a device."""
    return lambda value: value.to(device) if isinstance(value, nn.Module) else on_device(value, device)


def as_it_is(value: Any) -> Any:
    """A module or a batch, where the copy is where the model is."""
    return value


def loss_beside(loss: Any, model: nn.Module, memo: dict[int, Any], move: Move) -> Any:
    """The loss for the copy of a model, moved as the copy is.

    Args:
        loss: None, or any loss.
        model: the original.
        memo: what became of its parts, as `copy.deepcopy` keeps it.
        move: of modules and tensors.
    """
    originals = {id(p): (name, p) for name, p in model.named_parameters()}

    def moved(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return move(copy.deepcopy(value, memo))
        return move(mapped(value, lambda tensor: memo.get(id(tensor), tensor)))

    if isinstance(loss, partial):
        keywords = {key: moved(value) for key, value in loss.keywords.items()}
        return partial(loss_beside(loss.func, model, memo, move), *map(moved, loss.args), **keywords)
    if isinstance(loss, nn.Module):
        loss = moved(loss)
        if not isinstance(loss, torch.jit.ScriptModule):
            loss.register_forward_hook(Hook(lambda module, args, value: _refuse_original(value, originals), loss))
        return loss
    if isinstance(loss, MethodType) and id(loss.__self__) in memo:
        loss = MethodType(loss.__func__, memo[id(loss.__self__)])
    return loss if distribution_of(loss) else _watched(loss, originals)


def _watched(loss: Callable[..., Any], originals: dict[int, tuple[str, nn.Parameter]]) -> Callable[..., Any]:
    @wraps(loss)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _asking([p for _, p in originals.values()]):
            value = loss(*args, **kwargs)
        _refuse_original(value, originals)
        return value

    watched.__name__ = name_of(loss)
    watched.reduction = reduction_of(loss)  # type: ignore[attr-defined]  # where its class has it, `wraps` has not
    return watched


@contextmanager
def _asking(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, frozen parameters ask for gradients, as those of the copy do: else their part would not be seen."""
    frozen = [p for p in parameters if p.is_floating_point() and not p.requires_grad and not p.is_inference()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _refuse_original(value: Any, originals: dict[int, tuple[str, nn.Parameter]]) -> None:
    """A ValueError where the loss's graph leads to a parameter of the original."""
    seen: set[Any] = set()
    nodes = [value.grad_fn] if isinstance(value, Tensor) else []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name, parameter = originals.get(id(getattr(node, "variable", None)), ("", None))
        if parameter is not None:
            raise ValueError(
                f"the loss uses the model itself (its parameter {name!r}), and what is differentiated is a copy of it "
                "(in float64, or on the device asked for), which this part of the loss does not see; have the model "
                "return it with its output, or pass a loss that is an nn.Module and holds the model"
            )
        nodes += [further for further, _ in node.next_functions]
