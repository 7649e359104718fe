"""Copies of a network, also of one that still holds what its last forward pass computed."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves


def made_inside(model: nn.Module) -> bool:
    """Whether the model, or a part of it, was made in inference mode: autograd refuses its tensors."""
    return any(t.is_inference() for t in chain(model.parameters(), model.buffers()) if not is_lazy(t))


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of the model, which autograd takes whatever inference mode is on or the model was made in.

    Attention maps or features that its modules have kept, and the weights of pruned layers, are parts of a graph, which
    torch refuses to copy: of these the copy has the values alone. In lists, tuples and dicts they are found, too.
    `memo` gets what became of the model's parts, as `copy.deepcopy` keeps it.
    """
    memo = {} if memo is None else memo
    with torch.inference_mode(False):
        kept = [part for module in model.modules() for part in tree_leaves(vars(module)) if isinstance(part, Tensor)]
        memo |= {id(part): part.detach().clone() for part in kept if not part.is_leaf}
        return copy.deepcopy(model, memo)


def copy_in_float64(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copied`, in float64 throughout: where its forward pass makes float32 (`x.float() / 255`), layers widen it."""
    with torch.inference_mode(False):
        wide = copied(model, memo).double()
        for module in wide.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(tensor.is_floating_point() for tensor in own) and not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(_widen, with_kwargs=True)
    return wide


def _widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(_wide(value) for value in args), {key: _wide(value) for key, value in kwargs.items()}


def _wide(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_wide(part) for part in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
