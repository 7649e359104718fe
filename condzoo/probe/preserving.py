"""Leave a model and the random streams bitwise as they were, whatever happens in between.

A `Probe` on the same model leaves out the passes inside, and what is compiled runs uncompiled there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from condzoo.probe.wrappers import uncompiled, without_reentrant_checkpoints, without_synchronization

OF_ALL = vars(nn.Module()).keys()  # hooks, modes, ...

_inside = 0  # measurements under way


def at_rest() -> bool:
    """Whether a measurement is under way, whose passes are no training steps."""
    return _inside > 0


@contextmanager
def preserved(model: nn.Module, seed: int, *beside: nn.Module) -> Iterator[None]:
    """Inside, the random streams start from `seed` and every parameter asks for gradients.

    Afterwards, also after an exception: buffers (BatchNorm's statistics and counters; those a pass has registered are
    gone), attributes of modules that have some, which parameters the model has, requires_grad and the random streams
    are as before: torch's on the CPU and the model's devices, Python's `random` and numpy's global one, which
    transforms of images draw from. What parameters hold, .grad and modes are for the caller to leave alone.

    Args:
        model: as above.
        seed: of the random streams.
        beside: other modules that run inside (a loss with a running mean), whose buffers and attributes are put back.

    Raises:
        ValueError: a lazy layer, which its first batch would change for good.
    """
    for name, module in (named for every in (model, *beside) for named in every.named_modules()):
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ValueError(f"layer {name!r} is not initialized yet (lazy); run one batch through the model first")
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    restore = _what_restores({m: None for every in (model, *beside) for m in every.modules()})
    global _inside
    with (
        torch.random.fork_rng(devices=devices),
        outside_torch(seed),
        uncompiled(),
        without_reentrant_checkpoints(),
        without_synchronization(),
    ):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        _inside += 1
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(True)
            yield
        finally:
            _inside -= 1
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            with ExitStack() as all_of_them:  # also after one that fails
                for put_back in restore:
                    all_of_them.callback(put_back)


@contextmanager
def outside_torch(seed: int) -> Iterator[None]:
    """Python's and numpy's global streams start from `seed`, and are afterwards as before."""
    python, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 (the stream of those who use it)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002


def _what_restores(modules: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """What puts each buffer back, and each parameter that a forward pass puts another in place of (VQ-VAE's codes)."""
    restore: list[Callable[[], None]] = []
    for module in modules:
        for name, parameter in module._parameters.items():
            restore.append(partial(_restore_parameter, module, name, parameter))
        of_others = {*OF_ALL, *module._parameters.keys()}
        attributes = _attributes(module, of_others)
        restore.append(partial(_restore_entries, module, dict(module._buffers.items()), attributes, of_others))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                version = None if buffer.layout == torch.strided else buffer._version
                restore.append(partial(_restore_buffer, module, name, buffer, buffer.clone(), version))
    return restore


def _restore_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    now = dict(module._parameters.items()).get(name)  # torch.jit's parameters have no `get`
    if isinstance(now, nn.Parameter) and now is not parameter and not _is_sharded(now, parameter):
        module._parameters[name] = parameter


def _is_sharded(*parameters: nn.Parameter | None) -> bool:
    """Whether one is a DTensor; `fully_shard` puts whole ones in its place as it needs them, and keeps count."""
    return any(hasattr(parameter, "placements") for parameter in parameters)


def _attributes(module: nn.Module, of_others: set[str]) -> dict[str, Any]:
    """A module's own attributes, and where one is a dict, also what is in it."""
    own = {key: value for key, value in vars(module).items() if key not in of_others}
    return {key: (value, dict(value) if type(value) is dict else None) for key, value in own.items()}


def _restore_entries(
    module: nn.Module, buffers: dict[str, Tensor | None], attributes: dict[str, Any], of_others: set[str]
) -> None:
    """Which buffers the module has, and with them the attributes: some say what the buffers hold, as a cache's length.

    Lists are left alone: they are where a network collects what it is to be asked for afterwards.

    Args:
        module: left alone if it has no buffers.
        buffers, attributes: before.
        of_others: names to leave alone: torch's, and those of parameters, in whose place FSDP puts whole ones.
    """
    if isinstance(module, torch.jit.ScriptModule) or not (buffers or module._buffers):
        return
    new = module._buffers.keys() - buffers
    module._non_persistent_buffers_set.difference_update(new)
    for name in new:
        del module._buffers[name]
    module._buffers.update({name: None for name, buffer in buffers.items() if buffer is None})
    for key in _attributes(module, of_others).keys() - attributes:
        del vars(module)[key]
    for key, (value, entries) in attributes.items():
        vars(module)[key] = value
        if entries is not None and not _same(value, entries):
            value.clear()
            value.update(entries)


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return now.keys() == before.keys() and all(now[key] is before[key] for key in before)


def _restore_buffer(module: nn.Module, name: str, buffer: Tensor, values: Tensor, version: int | None) -> None:
    """version: of a sparse buffer, which `torch.equal` does not take."""
    module._buffers[name] = buffer
    if not torch.equal(buffer, values) if version is None else buffer._version != version:
        # Not as a change: a backward pass of the caller's that is still to come may have saved the buffer.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(buffer):
            if version is None and buffer.shape != values.shape:  # an observer's, which its first batch makes larger
                buffer.resize_(values.shape)
            buffer.copy_(values)
