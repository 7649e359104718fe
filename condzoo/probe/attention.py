"""The projections inside nn.MultiheadAttention, which calls no submodule for them.

`F.multi_head_attention_forward` applies its weights through the function `linear` of
torch.nn.functional; while a watched module runs, another function in its place reports each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condzoo.probe.hooks import Hook
from condzoo.probe.wrappers import in_transform

Report = Callable[[str, nn.Module, Tensor, Tensor], None]
Watcher = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]

# (first row, last row) of the packed weight, in embedding widths
_PARTS = {(0, 3): "in_proj", (0, 1): "q_proj", (1, 2): "k_proj", (2, 3): "v_proj", (1, 3): "kv_proj"}
_SPLIT = ("in_proj_bias_q", "in_proj_bias_k", "in_proj_bias_v")  # parameters in place of the packed `in_proj_bias`

# Of the attentions that run now, and what each reports to; weak, for a call that Ctrl-C ends does not take itself out.
_watchers: WeakKeyDictionary[Watcher, WeakMethod[Report]] = WeakKeyDictionary()
_original: Any = F.linear


def projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The weights that are whole parameters, or computed, as linear layers that share them, by their local names."""
    packed = _held(attention, "in_proj_weight")
    if packed is not None:
        return {"in_proj": _layer(packed, _held(attention, "in_proj_bias"))}
    separate = {f"{x}_proj": _held(attention, f"{x}_proj_weight") for x in "qkv"}
    parts = dict(zip(separate, _biases(attention), strict=True))
    return {name: _layer(weight, parts[name]) for name, weight in separate.items() if weight is not None}


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether a parametrization computes this, anew each time it is read.

    That may change what it is computed from (spectral_norm's vectors), so that nothing here reads it.
    """
    return name in getattr(module, "parametrizations", ())


def _held(attention: nn.MultiheadAttention, name: str) -> Tensor | None:
    """A weight or bias as it is now.

    In place of one that is computed, or of a process's flat part of one (FullyShardedDataParallel), a tensor of its
    shape, without values.
    """
    width = attention.embed_dim
    shapes = {
        "in_proj_weight": (3 * width, width),
        "q_proj_weight": (width, width),
        "k_proj_weight": (width, attention.kdim),
        "v_proj_weight": (width, attention.vdim),
        "in_proj_bias": (3 * width,),
    }
    if not _is_computed(attention, name):
        held: Tensor | None = getattr(attention, name)
        if held is None or held.ndim > 1 or held.shape == shapes[name]:
            return held
    return torch.empty(shapes[name], device="meta")


def split_biases(model: nn.Module) -> None:
    """Make each packed bias of separate weights three parameters, for a copy that is differentiated and thrown away.

    The attention reads a tensor computed from them, so that derivatives with respect to a projection's own bias exist.
    """
    done: dict[int, tuple[list[Any], Tensor]] = {}  # by the bias, which several attentions may share
    for attention in model.modules():
        if not isinstance(attention, nn.MultiheadAttention):
            continue
        bias = attention._parameters.get("in_proj_bias")
        if bias is None or _held(attention, "in_proj_weight") is not None:
            continue
        if id(bias) not in done:
            with torch.enable_grad():
                own: list[Any] = [nn.Parameter(part.detach().clone()) for part in bias.chunk(3)]
                done[id(bias)] = own, torch.cat(own)
        del attention.in_proj_bias
        parts, vars(attention)["in_proj_bias"] = done[id(bias)]
        for name, part in zip(_SPLIT, parts, strict=True):
            attention.register_parameter(name, part)


def _biases(attention: nn.MultiheadAttention) -> list[Any]:
    """Of queries, keys and values: parameters, None, or what stands for slices, which a sharded one has not at rest."""
    bias = _held(attention, "in_proj_bias")
    if bias is None:
        return [None] * 3
    own = [attention._parameters.get(name) for name in _SPLIT]
    return [torch.empty(bias.shape, device="meta")] * 3 if None in own else own


def parts_of(name: str) -> list[str]:
    """The layers that a packed `in_proj` of this name is, where queries, keys and values are not all the same."""
    above, _, local = name.rpartition(".")
    parts = [part for part in _PARTS.values() if part != "in_proj"] if local == "in_proj" else []
    return [f"{above}.{part}".lstrip(".") for part in parts]


def packed_name(name: str) -> str:
    """The name of the packed `in_proj` that a layer of this name is a part of; its own where it is none."""
    above, _, local = name.rpartition(".")
    return f"{above}.in_proj".lstrip(".") if local in _PARTS.values() else name


def part_of(packed: nn.Module, name: str) -> nn.Linear:
    """A part of a packed `in_proj` as a layer, for a process that has not used it, but another one has."""
    local = name.rpartition(".")[2]
    first, last = next(rows for rows, part in _PARTS.items() if part == local)
    width: Any = packed.in_features
    return _layer(torch.empty(((last - first) * width, width), device="meta"), None)


def packed_weights(attention: nn.MultiheadAttention) -> dict[str, Tensor | None]:
    """The weights as they are now (sharded training puts others in their place), by the local names of layers.

    None in place of those that are not there or computed: `watch_computed_inside` reports these.
    """
    weights = _weights(attention)
    return {local: None if _is_computed(*at) else getattr(*at) for local, at in weights.items()}


def watch_computed_inside(
    attention: nn.MultiheadAttention, report: Callable[[str, Tensor], None]
) -> list[RemovableHandle]:
    """Report (local name of the layer, weight) each time a parametrization has computed the weight of one."""
    handles: list[RemovableHandle] = []
    for local, (module, name) in _weights(attention).items():
        if _is_computed(module, name):
            computing = module.parametrizations[name]
            hook = Hook(partial(_report_computed, report, local), computing)
            handles.append(computing.register_forward_hook(hook))
    return handles


def _report_computed(report: Callable[[str, Tensor], None], local: str, _: Any, args: Any, weight: Tensor) -> None:
    report(local, weight)


def watch_beside(attention: nn.MultiheadAttention, report: Callable[[str, Tensor], None]) -> RemovableHandle:
    """Report (local name of the layer, weight) after each call for weights that a hook put beside the parameters."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for local, (holder, name) in _weights(attention).items():
            if isinstance(weight := vars(holder).get(name), Tensor):
                report(local, weight)

    return attention.register_forward_hook(Hook(after, attention), prepend=True)


def _weights(attention: nn.MultiheadAttention) -> dict[str, tuple[Any, str]]:
    """Where each weight is, by the local name of the layer: a module, and the attribute's name."""
    inside: dict[str, tuple[Any, str]] = {f"{x}_proj": (attention, f"{x}_proj_weight") for x in ("in", "q", "k", "v")}
    return inside | {"out_proj": (attention.out_proj, "weight")}


def watch(name: str, attention: nn.MultiheadAttention, report: Report) -> Iterator[RemovableHandle]:
    """Report (layer name, module, input, output) of each projection while `attention` runs; hooks come one by one."""
    layers = projections(attention)
    called: list[nn.Module] = []  # the output projection, while a subclass calls it: its own hooks see that
    computed: WeakValueDictionary[str, Tensor] = WeakValueDictionary()  # by local name, as last computed

    def watcher(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor) -> None:
        if in_transform():  # which weight this is cannot be told; all of them are in it
            for each, layer in {**layers, "out_proj": attention.out_proj}.items():
                report(f"{name}.{each}" if name else each, layer, x, h)
            return
        local = _local_name(attention, weight, computed)
        if local is not None and not called:
            layer = attention.out_proj if local == "out_proj" else layers.get(local) or _layer(weight, bias)
            report(f"{name}.{local}" if name else local, layer, x, h)

    def before(module: nn.Module, args: Any) -> None:
        _watchers[watcher] = WeakMethod(report)
        _put_linear()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        _watchers.pop(watcher, None)
        _put_linear()

    out = attention.out_proj
    yield from watch_computed_inside(attention, computed.__setitem__)
    yield attention.register_forward_pre_hook(Hook(before, attention))
    yield attention.register_forward_hook(Hook(after, attention), always_call=True, prepend=True)
    yield out.register_forward_pre_hook(Hook(lambda module, args: called.append(module), out))
    yield out.register_forward_hook(Hook(lambda *_: called.clear(), out), always_call=True, prepend=True)


def stop(report: Report) -> None:
    """Report no call any more to this: what is no `Exception` (KeyboardInterrupt) passes by the hooks that end it."""
    for watcher in [watcher for watcher, to in _watchers.items() if to() == report]:
        del _watchers[watcher]
    _put_linear()


def _put_linear() -> None:
    """Replace the function of torch.nn.functional while any attention is watched, and only then."""
    global _original
    if _watchers and F.linear is not _linear:
        _original = F.linear
        F.linear = _linear  # type: ignore[assignment]
    elif not _watchers and F.linear is _linear:
        F.linear = _original


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    h = _original(input, weight, bias)
    for watcher in tuple(_watchers):
        watcher(input, weight, bias, h)
    return h


def _local_name(attention: nn.MultiheadAttention, weight: Tensor, computed: Mapping[str, Tensor]) -> str | None:
    weights = packed_weights(attention) | dict(computed)
    if weight is weights["out_proj"]:
        return "out_proj"
    packed = weights["in_proj"]
    if packed is None:
        return next((local for local, own in weights.items() if own is weight), None)
    if weight.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr():
        return None
    width = attention.embed_dim
    first = (weight.storage_offset() - packed.storage_offset()) // (packed.stride(0) * width)
    return _PARTS.get((first, first + weight.shape[0] // width))


def has_bias(module: nn.Module) -> bool:
    """Whether this layer adds a bias, be it a slice of a packed one."""
    # to read one that is computed would compute it once more, with random numbers of its own
    return has_computed_bias(module) or getattr(module, "bias", None) is not None


def has_computed_bias(module: nn.Module) -> bool:
    """Whether this layer's bias is no parameter of its own: a parametrization computes it, or it is a slice."""
    return _is_computed(module, "bias") or bool(getattr(module, "sliced_bias", False))


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around an existing weight; a slice of a parameter is seen, but is no parameter."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.register_parameter("weight", weight if isinstance(weight, nn.Parameter) else None)
    layer.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
    vars(layer)["sliced_bias"] = bias is not None and layer.bias is None
    return layer
