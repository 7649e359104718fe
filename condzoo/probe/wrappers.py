"""A model's modules by the names its author gave them, whatever wraps them: DDP, FSDP, torch.compile, checkpointing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# attributes under which FullyShardedDataParallel, checkpoint_wrapper and torch.compile keep what they wrap
INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its wrappers."""
    while isinstance(model, nn.Module) and (inner := _inside(model)) is not None:
        model = inner
    return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without wrappers, neither as modules nor in the names."""
    for name, module in model.named_modules():
        if _inside(module) is None:
            yield ".".join(part for part in name.split(".") if part not in INSIDE), module


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what torch.compile has compiled runs eagerly: a compiled graph has no hooks."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled; importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, DistributedDataParallel):
        return module.module
    return next((module._modules[key] for key in INSIDE if key in module._modules), None)
