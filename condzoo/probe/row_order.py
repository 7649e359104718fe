"""Whether a layer's rows are those of the samples that they are taken for, seen by what the rows depend on.

A model that takes its time steps, or two views of each sample, one after the other has rows that no longer follow the
samples. Where gradients by sample cannot show it (a loss of several outputs, batch statistics), this does: rows of a
sample stay as they are when the other samples are replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from condzoo.probe.batches import batch_size, call, mapped
from condzoo.probe.calls import STRIDED, called_on, layout
from condzoo.probe.function_calls import BatchStatistics
from condzoo.probe.preserving import preserved

SAME = 1e-6  # rounding between two passes, relative


def disordered(model: nn.Module, layers: Mapping[str, nn.Module], x: Any) -> set[str]:
    """The layers some of whose rows are of other samples than they are taken for.

    Passes with every sample replaced whose number has a 1 in one binary digit, for each digit: of rows that are
    permuted some are of a sample of a higher number, which has a 1 where that of the sample they are taken for has a 0.
    BatchNorms use their running statistics; none are found where other batch statistics are left.
    """
    samples = batch_size(x)
    training = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    found: set[str] = set()
    try:
        _set_training(training, False)
        with BatchStatistics() as noted:
            expected = _inputs(model, layers, x, samples)
        for digit in range(0 if noted.seen else (samples - 1).bit_length()):
            index = torch.arange(samples, device="cpu")
            kept = (index >> digit) % 2 == 0
            seen = _inputs(model, layers, mapped(x, partial(_taken, torch.where(kept, index, 0))), samples)
            found |= {name for name in layers if not _alike(expected[name], seen[name], kept)}
    finally:
        _set_training(training, True)
    return found


def _set_training(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


def _taken(index: Tensor, part: Tensor) -> Tensor:
    """The samples of these numbers, of a tensor that has one an entry."""
    by_sample = layout(part) == STRIDED and part.ndim > 0 and len(part) == len(index)
    return part[index.to(part.device)] if by_sample else part


def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], x: Any, samples: int) -> dict[str, list[Tensor]]:
    """What each call of the layers reads, by sample as `LayerRows` has it."""
    read: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Any) -> None:
        value = called_on(args, kwargs)
        if isinstance(h, Tensor) and h.requires_grad and layout(value) == STRIDED and not len(value) % samples:
            read[name].append(value.detach().reshape(samples, -1))

    handles = [m.register_forward_hook(partial(note, name), with_kwargs=True) for name, m in layers.items()]
    try:
        with preserved(model, 0):
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return read


def _alike(expected: list[Tensor], seen: list[Tensor], kept: Bool[Tensor, " n"]) -> bool:
    """Whether the samples that were kept have read the same."""
    if [a.shape for a in expected] != [b.shape for b in seen]:
        return False
    pairs = [(a[kept.to(a.device)], b[kept.to(b.device)]) for a, b in zip(expected, seen, strict=True)]
    return all(float((a - b).norm()) <= SAME * float(a.norm()) for a, b in pairs)
