"""Moments summed over the processes of data-parallel training: the numbers of one process with all data.

Each process scales its gradients by its own batch, so the sums over all rows are those of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from condzoo.probe.capture import Capture, LayerSums
from condzoo.probe.moments import RunningMoment
from condzoo.probe.neurons import RunningNeurons

_SIDES = ("input", "output_grad")


def active() -> bool:
    """Whether there is more than one process to sum over."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not active() or dist.get_rank() == 0


def total(number: int, device: torch.device) -> int:
    """The sum of a number over the processes."""
    value = torch.tensor(number, device=device)
    dist.all_reduce(value)
    return int(value)


def sum_over_ranks(capture: Capture, device: torch.device) -> None:
    """Make every process's sums those of all processes; all must call it at the same step.

    Layers that only some processes called are summed over those; the order is that of the first process.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (_described(capture), {n: u.rows for n, u in capture.neurons.items()}))
    names = list(dict.fromkeys(name for layers, _ in gathered for name in layers))
    merged: dict[str, LayerSums] = {}
    parts: list[tuple[RunningMoment, tuple[int, ...]]] = []
    for name in names:
        known = [layers[name] for layers, _ in gathered if name in layers]
        merged[name] = capture.sums.get(name, LayerSums())
        merged[name].samples = sum(entry["samples"] for entry in known)
        for side in _SIDES:
            moment = getattr(merged[name], side)
            entries = [entry[side] for entry in known if entry[side] is not None]
            if entries:
                parts.append((moment, entries[0]["shape"]))
                _adopt(moment, entries)
    _sum_totals(parts, device)
    capture.sums = merged
    _sum_neurons(capture, [neurons for _, neurons in gathered], device)


def average_gradients(grads: dict[str, Tensor]) -> None:
    """The mean over processes of each weight's gradient, in place, as data-parallel training takes it."""
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()


def _described(capture: Capture) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    for name, sums in capture.sums.items():
        described[name] = {"samples": sums.samples}
        for side in _SIDES:
            moment: RunningMoment = getattr(sums, side)
            moment.spill()
            kept = ("rows", "vectors", "noise", "dtype", "finite", "fast")
            entry = {key: getattr(moment, key) for key in kept}
            shape = None if moment.total is None else tuple(moment.total.shape)
            described[name][side] = None if shape is None else entry | {"shape": shape}
    return described


def _adopt(moment: RunningMoment, entries: list[dict[str, Any]]) -> None:
    moment.rows = sum(e["rows"] for e in entries)
    moment.vectors = sum(e["vectors"] for e in entries)
    moment.noise = sum(e["noise"] for e in entries)
    moment.dtype = max((e["dtype"] for e in entries), key=lambda dtype: torch.finfo(dtype).eps)
    moment.finite = all(e["finite"] for e in entries)
    moment.fast = any(e["fast"] for e in entries)


def _sum_totals(parts: list[tuple[RunningMoment, tuple[int, ...]]], device: torch.device) -> None:
    if not parts:
        return
    empty = torch.zeros(1, dtype=torch.float64, device=device)
    flat = torch.cat([(empty.expand(shape) if m.total is None else m.total.to(device)).flatten() for m, shape in parts])
    dist.all_reduce(flat)
    for (moment, shape), values in zip(parts, flat.split([torch.Size(s).numel() for _, s in parts]), strict=True):
        moment.total = values.reshape(shape).clone()


def _sum_neurons(capture: Capture, rows: list[dict[str, int]], device: torch.device) -> None:
    for name in rows[0]:  # ReLUs that every process has called
        if not all(name in seen for seen in rows):
            continue
        units: RunningNeurons = capture.neurons[name]
        assert units.been_positive is not None
        assert units.been_zero is not None
        seen = torch.stack([units.been_positive, units.been_zero]).to(device, torch.int32)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        units.been_positive, units.been_zero = seen.bool().unbind()
        units.rows = sum(of_rank[name] for of_rank in rows)
