"""Moments summed over the processes of data-parallel training: the numbers of one process with all data.

Each process scales its gradients by its own batch and undoes its own factor on the loss, so the sums over all rows
are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from condzoo.probe.attention import packed_name, part_of
from condzoo.probe.capture import Capture
from condzoo.probe.layer_sums import LayerSums
from condzoo.probe.moments import RunningMoment
from condzoo.probe.neurons import CHANGING, RunningNeurons
from condzoo.probe.weights import Norms

_SIDES = ("input", "output_grad")
# of a moment, to the other processes
_TOLD = ("rows", "vectors", "noise", "dtype", "finite", "fast", "mixed", "grain", "vanished")
ELSEWHERE = "the models of some processes have no such layer (pipeline parallelism?): its sums are not known to all"
NOT_CALLED: dict[str, Any] = {"samples": 0, "hidden": None, "input": None, "output_grad": None}


def active() -> bool:
    """Whether there is more than one process to sum over."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not active() or dist.get_rank() == 0


def total(number: int, model: nn.Module) -> int:
    """The sum of a number over the processes."""
    return _reduced(number, model, dist.ReduceOp.SUM) if active() else number


def largest(number: int, model: nn.Module) -> int:
    """The largest of the processes' numbers."""
    return _reduced(number, model, dist.ReduceOp.MAX) if active() else number


def sum_over_ranks(capture: Capture, model: nn.Module, *, split: bool = False, later: bool = False) -> bool:
    """Make every process's sums those of all processes; all must call it at the same step.

    Layers that only some processes called are summed over those; the order is that of the first process. What one
    process could not see of a layer is missing in the sum, which none then has; nor is there one of a layer that a
    process does not have. Under tensor parallelism several processes compute on the same samples, which count once.

    Args:
        capture, model: what this process has seen, and of what.
        split: it computes with a part of a weight; later: with one that is not the first.

    Returns:
        Whether this process's sums were left out, as another one has them.
    """
    device = _device(model)
    units = {name: (u.rows, u.count().units if u.hidden is None else u.hidden) for name, u in capture.neurons.items()}
    told = _described(capture), units, capture.dtypes, set(capture.layers), (later, _marks(capture)) if split else None
    gathered, left_out = _without_repeated(_gathered(told, device))
    if left_out:
        capture.clear()
    names = list(dict.fromkeys(name for layers, *_ in gathered for name in layers))
    elsewhere = {name for name in names for *_, own, _ in gathered if not {name, packed_name(name)} & own}
    for name in set(names) - set(capture.layers) - elsewhere:
        capture.layers[name] = part_of(capture.layers[packed_name(name)], name)
    merged: dict[str, LayerSums] = {}
    parts: list[tuple[RunningMoment, tuple[int, ...]]] = []
    for name in names:
        of_ranks = [layers.get(name, NOT_CALLED) for layers, *_ in gathered]
        merged[name] = capture.sums.get(name, LayerSums())
        merged[name].samples = sum(entry["samples"] for entry in of_ranks)
        hidden = [ELSEWHERE] if name in elsewhere else [e["hidden"] for e in of_ranks if e["hidden"] is not None]
        merged[name].hidden = next(iter(hidden), None)
        for side in _SIDES:
            moment = getattr(merged[name], side)
            entries = [entry[side] for entry in of_ranks if entry[side] is not None]
            if not entries:
                continue
            _adopt(moment, entries)
            shape, kept = entries[0]["shape"], [0 if entry[side] is None else entry[side]["kept"] for entry in of_ranks]
            if merged[name].hidden is not None or moment.mixed or not moment.fits(*shape[:2]):  # as each finds alike
                continue
            if None not in kept and sum(kept) < shape[1]:
                _join_vectors(moment, shape, kept, device)
            else:
                moment.spill()
                parts.append((moment, shape))
    _sum_totals(parts, device)
    capture.sums, capture.dtypes = merged, set().union(*(dtypes for _, _, dtypes, *_ in gathered))
    _agree_on_origin(capture, device)
    _sum_neurons(capture, [neurons for _, neurons, *_ in gathered], device)
    return left_out


def summed(
    grads: dict[str, Tensor], weight: float, norms: dict[str, Norms], model: nn.Module
) -> tuple[dict[str, Tensor], float, dict[str, Norms]]:
    """The sums over processes of each weight's gradient, in at least float32, and of what they are to be divided by.

    Who has none adds nothing. With them each weight's norms, as the first process has them that has some.

    The gradients came in the order of each process's own backward pass; here they go in one order.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    device = _device(model)
    gathered = _gathered(({name: tuple(grad.shape) for name, grad in grads.items()}, weight, norms), device)
    for of_rank, _, _ in gathered:
        shapes |= of_rank
    known = {name: held for *_, norms in reversed(gathered) for name, held in norms.items()}
    wide = any(grad.dtype == torch.float64 for grad in grads.values())
    wide = total(int(wide), model) > 0
    found: dict[str, Tensor] = {}
    for name, shape in sorted(shapes.items()):
        grad = grads[name] if name in grads else torch.zeros(shape, device="cpu")
        found[name] = grad.to(device, torch.float64 if wide else torch.float32, copy=True)
        dist.all_reduce(found[name])
    return found, sum(weight for _, weight, _ in gathered), known


def _reduced(number: int, model: nn.Module, how: dist.ReduceOp.RedOpType) -> int:
    value = torch.tensor(number, device=_device(model))
    dist.all_reduce(value, op=how)
    return int(value)


def _gathered(mine: Any, device: torch.device) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # NCCL sends from the current one
        dist.all_gather_object(found, mine)
    return found


def _device(model: nn.Module) -> torch.device:
    """Where tensors must be for the processes to exchange them."""
    devices = [p.device for p in model.parameters()]
    if dist.get_backend() == "nccl":  # the current device is the first one in every process, unless it was set
        own = next((device for device in devices if device.type == "cuda"), None)
        return torch.device("cuda", torch.cuda.current_device()) if own is None else own
    return devices[0]


def _marks(capture: Capture) -> list[tuple[str, int, list[float]]]:
    """What layers were called on, in a few numbers: alike to the last digit only where the samples are the same."""
    inputs = [(name, sums.input) for name, sums in capture.sums.items()]
    return [(name, x.rows, [float(t.sum()) for t in (x.total, *x.pending) if t is not None]) for name, x in inputs]


def _without_repeated(gathered: list[Any]) -> tuple[list[Any], bool]:
    """What the processes tell, without what repeats another's, and whether this process's is such."""
    firsts = [marks[1] for *_, marks in gathered if marks is not None and not marks[0]]
    repeated = [marks is not None and marks[0] and marks[1] in firsts for *_, marks in gathered]
    kept = [({}, {}, set(), *told[3:]) if again else told for told, again in zip(gathered, repeated, strict=True)]
    return kept, repeated[dist.get_rank()]


def _described(capture: Capture) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    for name, sums in capture.sums.items():
        described[name] = {"samples": sums.samples, "hidden": sums.hidden}
        for side in _SIDES:
            moment: RunningMoment = getattr(sums, side)
            entry = {key: getattr(moment, key) for key in _TOLD}
            empty = moment.total is None and not moment.pending and moment.dropped is None
            described[name][side] = None if empty else entry | {"shape": moment.shape, "kept": moment.kept}
    return described


def _adopt(moment: RunningMoment, entries: list[dict[str, Any]]) -> None:
    moment.rows = sum(e["rows"] for e in entries)
    moment.vectors = sum(e["vectors"] for e in entries)
    moment.noise = sum(e["noise"] for e in entries)
    moment.dtype = max((e["dtype"] for e in entries), key=lambda dtype: torch.finfo(dtype).eps)
    moment.finite = all(e["finite"] for e in entries)
    moment.grain = max(e["grain"] for e in entries)
    moment.fast = any(e["fast"] for e in entries)
    moment.vanished = any(e["vanished"] for e in entries)
    moment.mixed = any(e["mixed"] for e in entries) or len({e["shape"] for e in entries}) > 1


def _join_vectors(moment: RunningMoment, shape: tuple[int, ...], kept: Sequence[int], device: torch.device) -> None:
    """The vectors that each process kept, all of them: fewer than coordinates, so that their sum need not be formed."""
    padded = torch.zeros((*shape[:2], max(kept)), dtype=torch.float64, device=device)
    if moment.pending:
        padded[:, :, : kept[dist.get_rank()]] = torch.cat(moment.pending, dim=2).to(device)
    of_ranks = [torch.empty_like(padded) for _ in kept]
    dist.all_gather(of_ranks, padded)
    moment.pending = [torch.cat([part[:, :, :count] for part, count in zip(of_ranks, kept, strict=True)], dim=2)]


def _sum_totals(parts: list[tuple[RunningMoment, tuple[int, ...]]], device: torch.device) -> None:
    if not parts:
        return
    empty = torch.zeros(1, dtype=torch.float64, device=device)
    flat = torch.cat([(empty.expand(shape) if m.total is None else m.total.to(device)).flatten() for m, shape in parts])
    dist.all_reduce(flat)
    for (moment, shape), values in zip(parts, flat.split([torch.Size(s).numel() for _, s in parts]), strict=True):
        moment.total = values.reshape(shape).clone()


def _agree_on_origin(capture: Capture, device: torch.device) -> None:
    """The first layer, in their order, whose output held NaN or Inf in a process; looked for where any shows some."""
    capture.origin.find(everywhere=not all(sums.output_grad.finite for sums in capture.sums.values()))
    found = set(_gathered(capture.origin.name, device))
    capture.origin.name = next((name for name in capture.sums if name in found), None)


def _sum_neurons(capture: Capture, of_ranks: list[dict[str, tuple[int, int | str]]], device: torch.device) -> None:
    merged: dict[str, RunningNeurons] = {}
    for name in dict.fromkeys(name for units in of_ranks for name in units):
        known = [units[name] for units in of_ranks if name in units]
        hidden = [count for _, count in known if isinstance(count, str)]
        counts = {count for _, count in known if isinstance(count, int)}
        if hidden or len(counts) > 1:
            merged[name] = RunningNeurons(hidden=hidden[0] if hidden else CHANGING)
            continue
        mine = capture.neurons.get(name)
        seen = torch.zeros((2, *counts), dtype=torch.int32, device=device)
        if mine is not None and mine.been_positive is not None and mine.been_zero is not None:
            seen = torch.from_numpy(np.stack([mine.been_positive, mine.been_zero])).to(seen)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        positive, zero = seen.bool().cpu().numpy()
        merged[name] = RunningNeurons(positive, zero, sum(rows for rows, _ in known))
    capture.neurons = merged
