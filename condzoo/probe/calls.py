"""What a call of a layer was on, and whether the rows of its input and output can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

STRIDED = "strided tensor"


def layout(value: Any) -> str:
    """What a value is: a strided, sparse or nested tensor, one inside vmap or grad, or the name of another class."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if of_transform(value):
        return "tensor inside a transform of torch.func"
    return "nested tensor" if value.is_nested else str(value.layout).removeprefix("torch.") + " tensor"


def of_transform(value: Tensor) -> bool:
    """Whether this tensor, inside vmap or grad, holds no values to read, as gradients of `is_grads_batched`."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(value) or functorch.is_legacy_batchedtensor(value)


def called_on(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer reads: its first argument, or `input`, or the first tensor where a subclass names it otherwise."""
    if args:
        return args[0]
    return kwargs.get("input", next((value for value in kwargs.values() if isinstance(value, Tensor)), None))


def weight_now(module: nn.Module) -> Any:
    """The weight as it is now, which sharded training puts beside the parameters; not computed for this."""
    return vars(module).get("weight", module._parameters.get("weight"))


def unreadable(module: nn.Module, x: Any, h: Any) -> str | None:
    """What kind of layer this is, if the rows of its input x and output h cannot be read."""
    for what, value in (("input", x), ("output", h)):
        got = layout(value)
        if got == STRIDED and not value.is_floating_point():
            got = f"tensor of {str(value.dtype).removeprefix('torch.')}"
        if got != STRIDED:
            return f"a {type(module).__name__} whose {what} is a {got}"
    return None
