"""Leave a model and the random streams bitwise as they were, whatever happens in between.

A `Probe` on the same model leaves out the passes inside, and what is compiled runs uncompiled there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from condzoo.probe.wrappers import uncompiled, without_reentrant_checkpoints

_inside = 0  # measurements under way


def at_rest() -> bool:
    """Whether a measurement is under way, whose passes are no training steps."""
    return _inside > 0


@contextmanager
def preserved(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, the random streams start from `seed` and every parameter asks for gradients.

    Afterwards, also after an exception: buffers (BatchNorm's statistics and counters), requires_grad and
    the CPU's and the model's devices' random streams are as before. Parameters, .grad and modes are for
    the caller to leave alone.

    Raises:
        ValueError: a lazy layer, which its first batch would change for good.
    """
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ValueError(f"layer {name!r} is not initialized yet (lazy); run one batch through the model first")
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    global _inside
    with torch.random.fork_rng(devices=devices), uncompiled(), without_reentrant_checkpoints():
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
            for module, name, buffer, values in buffers:
                _restore(module, name, buffer, values)


def _restore(module: nn.Module, name: str, buffer: Tensor, values: Tensor) -> None:
    module._buffers[name] = buffer
    if not torch.equal(buffer, values):
        # Not as a change: a backward pass of the caller's that is still to come may have saved the buffer.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(buffer):
            buffer.copy_(values)
