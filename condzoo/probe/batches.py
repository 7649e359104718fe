"""What a batch may look like: pairs, dicts as Hugging Face's models take them, tuples of arguments."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Adapter = Callable[[Any], tuple[Any, Any]]

TARGETS = ("labels", "label")  # the targets' keys in a batch that is a dict
CHANNELS = 4  # of an image, at most: a tensor [c, h, w] in a list is one, and [b, t, d] is a batch of sequences


def each(batches: Iterable[Any], *, adapted: bool = False) -> Iterator[Any]:
    """The batches one by one; a single pair or dict counts as one batch.

    Args:
        batches: as for `measure`.
        adapted: an adapter makes pairs of them, so that dicts are batches whatever their keys.
    """
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a pair (x, y), or an iterable of such pairs, got {batches!r:.60}")
    return iter([batches] if isinstance(batches, Mapping) or _is_pair(batches, adapted=adapted) else batches)


def _is_pair(batches: Any, *, adapted: bool) -> bool:
    """Whether these are x and y, and not two batches: no batch is a tensor, nor a dict without targets.

    Two tuples, or lists, are two batches, as a tuple of arguments with a tuple of targets is, too.
    """
    if not isinstance(batches, (tuple, list)) or len(batches) != 2:
        return False
    x, y = batches
    if isinstance(x, Mapping):
        return not (isinstance(y, Mapping) and (adapted or (_holds_targets(x) and _holds_targets(y))))
    if any(isinstance(part, (Tensor, PackedSequence)) for part in (x, y)):
        return True
    # else a tuple of arguments, and targets that are no batch: a dict of them, an object, None
    is_batch = isinstance(y, (tuple, list)) or (isinstance(y, Mapping) and (adapted or _holds_targets(y)))
    return isinstance(x, (tuple, list)) and not is_batch


def _holds_targets(batch: Mapping[str, Any]) -> bool:
    return any(key in batch for key in TARGETS)


def as_pair(batch: Any, asked: nn.Module | None = None) -> tuple[Any, Any]:
    """A batch as (x, y): model arguments and targets.

    Args:
        batch: a pair, or a dict of the model's keyword arguments with the targets under "labels" or "label".
        asked: the model that may return its own loss: it gets a dict's targets, too, where its forward takes them.

    Raises:
        TypeError: neither of these; says what to pass.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in TARGETS if key in batch), None)
        if key is not None:
            rest = {k: v for k, v in batch.items() if k != key}
            own = next((name for name in (key, "labels") if asked is not None and _takes(asked, name)), None)
            return rest if own is None else rest | {own: batch[key]}, batch[key]
        got = f"dict with {', '.join(map(str, batch)) or 'nothing in it'}"
        raise TypeError(f"a batch that is a dict must hold 'labels', got a {got}; pass adapter=lambda batch: (x, y)")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise TypeError(f"a batch must be a pair (x, y), got a {got}; pass adapter=lambda batch: (x, y)")
    return batch[0], batch[1]


def _takes(model: nn.Module, keyword: str) -> bool:
    """Whether a model can be called with a keyword argument."""
    if isinstance(model, torch.jit.ScriptModule):  # whose forward has no signature
        return True
    parameters = inspect.signature(model.forward).parameters
    named = keyword in parameters and parameters[keyword].kind is not inspect.Parameter.POSITIONAL_ONLY
    return named or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def batch_size(x: Any) -> int:
    """Samples in a batch: the leading dimension of the first tensor in it, also inside dicts and tuples.

    Of a list of images [c, h, w], or of dicts with one each, as first argument, which detection models take, it is
    the length; of a PackedSequence the number of sequences. Dataclasses are looked into where there is no other tensor.

    Args:
        x: a tensor, the model's arguments in a tuple, list or dict, or a call: [arguments, keywords].

    Raises:
        TypeError: there is no tensor in it.
    """
    sizes = (size for inside in (False, True) for argument in _arguments(x) for size in _leading(argument, inside))
    found = next(sizes, None)
    if found is None and _is_call(x):
        raise TypeError(
            f"the model is called on {_names(_arguments(x))}, with no tensor in it whose leading dimension says how "
            "many samples there are; put probe.begin(batch) before each such call, batch a tensor, say the targets"
        )
    if found is None:
        raise TypeError(f"a batch must hold a tensor with a leading batch dimension, got {_kinds(x)}")
    return found


def _arguments(x: Any) -> Iterable[Any]:
    """What the model is called with, one by one."""
    if _is_call(x):
        return [*_arguments(x[0]), *x[1].values()]
    if isinstance(x, list) and x and all(isinstance(part, Mapping) and _is_sample(part) for part in x):
        return [x]  # a batch of Detectron2's, not yet an argument
    if isinstance(x, Mapping):
        return x.values()
    return x if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence) else [x]


def _is_call(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and isinstance(x[0], tuple) and isinstance(x[1], Mapping)


def _leading(x: Any, inside: bool) -> Iterator[int]:
    """The leading dimensions of the tensors in an argument; of those in dataclasses only with `inside`."""
    if isinstance(x, Tensor):
        if x.ndim:
            yield x.size(0)  # a nested tensor has no shape
    elif isinstance(x, PackedSequence):
        yield int(x.batch_sizes[0])
    elif isinstance(x, (tuple, list)) and x and all(map(_is_sample, x)):
        yield len(x)
    elif isinstance(x, (Mapping, tuple, list)):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from _leading(part, inside)
    elif inside and _is_dataclass(x):
        for field in fields(x):
            yield from _leading(getattr(x, field.name, None), inside)


def _is_dataclass(x: Any) -> bool:
    return is_dataclass(x) and not isinstance(x, type)


def _is_sample(x: Any) -> bool:
    return any(map(_is_image, x.values())) if isinstance(x, Mapping) else _is_image(x)


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.size(0) <= CHANNELS


def _kinds(x: Any) -> str:
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else None
    return type(x).__name__ + ("" if parts is None else f" of {_names(parts)}")


def _names(parts: Iterable[Any]) -> str:
    return ", ".join(sorted({type(part).__name__ for part in parts})) or "nothing"


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for a tensor, a dict of keyword arguments or a tuple of arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence) else model(x)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch, or part of one, with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    if isinstance(value, PackedSequence):  # its `batch_sizes` stay on the CPU
        rest = {key: mapped(getattr(value, key), change) for key in ("data", "sorted_indices", "unsorted_indices")}
        return value._replace(**rest)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its parts one by one
        return type(value)(*(mapped(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, change) for v in value)
    if _is_dataclass(value):
        changed = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                part = mapped(getattr(value, field.name), change)
                object.__setattr__(changed, field.name, part)  # a frozen one's, too
        return changed
    return value


def in_float64(value: Any) -> Any:
    """A batch with its floating-point tensors in float64."""
    return mapped(value, lambda t: t.double() if t.is_floating_point() else t)


def on_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; those of inference mode, which autograd refuses, as copies."""
    return mapped(value, lambda t: (t.clone() if t.is_inference() else t).to(device))
