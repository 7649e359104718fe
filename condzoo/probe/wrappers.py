"""A model's modules by their author's names, whatever wraps them: DDP, FSDP, Fabric, torch.compile, checkpointing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

REPLICATED = (DistributedDataParallel, nn.DataParallel)
FABRIC = "_forward_module"  # the attribute under which Lightning's Fabric keeps what it wraps
# the same of FullyShardedDataParallel, checkpoint_wrapper and torch.compile
INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", FABRIC)
IN_THREADS = (
    "nn.DataParallel over several devices runs copies of the model in threads, whose hooks cannot be told "
    "apart; train with DistributedDataParallel instead, or measure the model inside it (model.module)"
)

UNEQUAL = (
    "in the join() of DistributedDataParallel processes may take unequal numbers of steps, and a Probe sums over all "
    "of them; train as many steps in each process, without join(), or without a Probe"
)

_asking = 0  # `uncompiled` under way
_eager: ExitStack | None = None  # what ends the eager running


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its wrappers."""
    while isinstance(model, nn.Module) and (inner := _inside(model)) is not None:
        model = inner
    return model


def replica(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel or Fabric's wrapper, which runs by itself in this process; else the model."""
    while isinstance(model, nn.Module) and (isinstance(model, REPLICATED) or FABRIC in model._modules):
        inner = _inside(model)
        assert inner is not None
        model = inner
    return model


def refuse_threads(model: nn.Module) -> None:
    """A ValueError where nn.DataParallel runs copies of the model, or of a part of it."""
    if isinstance(model, nn.Module) and any(
        isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in model.modules()
    ):
        raise ValueError(IN_THREADS)


def refuse_scripted(model: nn.Module) -> None:
    """A ValueError where a model runs outside Python, where nothing sees its forward pass."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"the model is a {type(model).__name__}, which takes no hooks; train the module that torch.jit.script or "
            "torch.jit.trace was given"
        )


def refuse_replica(module: nn.Module) -> None:
    """A ValueError where this is one of those copies: they have the hooks of the model, which may know no wrapper."""
    if getattr(module, "_is_replica", False):
        raise ValueError(IN_THREADS)


def refuse_unequal() -> None:
    """A ValueError within a forward pass of DistributedDataParallel in its `join`."""
    around = DistributedDataParallel._active_ddp_module
    if around is not None and around._join_config.enable:
        raise ValueError(UNEQUAL)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without wrappers, neither as modules nor in the names."""
    short: dict[str, str] = {}  # names without wrappers; a parent comes before its children
    wraps: dict[str, bool] = {}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        above = short.get(parent, "") if name else ""
        short[name] = above if not name or wraps[parent] else f"{above}.{own}".lstrip(".")
        wraps[name] = _inside(module) is not None
        if not wraps[name]:
            yield short[name], module


def structure(model: nn.Module) -> list[tuple[str, nn.Module, type[nn.Module]]]:
    """What a model is made of: unequal once a module was put in, replaced, taken out, or became another class."""
    return [(name, module, type(module)) for name, module in model.named_modules()]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what torch.compile has compiled runs eagerly: a compiled graph has no hooks.

    Several may overlap and end in any order: the first sets the compiler's stance, and the last sets it back.
    """
    global _asking, _eager
    _asking += 1
    try:
        if _eager is None and "torch._dynamo" in sys.modules:  # else nothing is compiled; importing it takes seconds
            _eager = ExitStack()
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
        yield
    finally:
        _asking -= 1
        if _eager is not None and not _asking:
            _eager.close()
            _eager = None


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """Inside, checkpoints with use_reentrant=True keep what they compute: they refuse torch.autograd.grad."""
    before = vars(CheckpointFunction).get("apply")  # one of its own only where measurements nest
    CheckpointFunction.apply = staticmethod(lambda function, preserve, *args: function(*args))
    try:
        yield
    finally:
        if before is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = before


@contextmanager
def without_synchronization() -> Iterator[None]:
    """Inside, SyncBatchNorm has its own batch's statistics: the other processes make no such pass to wait for."""
    before = nn.SyncBatchNorm.forward
    nn.SyncBatchNorm.forward = _BatchNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = before  # type: ignore[method-assign]


def in_transform() -> bool:
    """Whether this runs inside `torch.func.grad`, `vmap`, ...: the tensors there hold no values to read."""
    return torch._C._are_functorch_transforms_active()


def reentrant_checkpoint(*, repeats: bool) -> Any:
    """The checkpoint with use_reentrant=True around, the outermost: running, to be repeated later, or repeated now.

    It is torch's context of the checkpoint, the same one in both; None: there is no such checkpoint.
    """
    code = (CheckpointFunction.backward if repeats else CheckpointFunction.forward).__code__
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        found = frame.f_locals["ctx"] if frame.f_code is code else found
        frame = frame.f_back
    return found


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, REPLICATED):
        return module.module
    return next((module._modules[key] for key in INSIDE if key in module._modules), None)
