"""Hooks that read each layer's input and output gradient from a forward and backward pass as it runs.

A forward hook sees the input, `register_hook` on the output its gradient: unlike full backward hooks
this works before an in-place ReLU. Nothing is kept but running sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condzoo.probe.arguments import checked
from condzoo.probe.arithmetic import PRECISIONS, Precision, plain_products
from condzoo.probe.attention import has_bias, stop, watch
from condzoo.probe.calls import called_on, unreadable
from condzoo.probe.function_calls import FunctionCalls, stop_interrupted
from condzoo.probe.hooks import Hook, apart, remove
from condzoo.probe.inner_products import InnerProducts, Watch
from condzoo.probe.layer_sums import LayerSums, add_input
from condzoo.probe.layers import CONVS, Conv, has_own_forward, is_measured, output_columns
from condzoo.probe.moments import RunningMoment
from condzoo.probe.neurons import RELUS, LinearRange, RunningNeurons, linear_range
from condzoo.probe.origins import Origin
from condzoo.probe.patches import padded_inside
from condzoo.probe.preserving import at_rest
from condzoo.probe.products import SharedProducts
from condzoo.probe.relu_calls import ReluCalls
from condzoo.probe.repetitions import Batch, Calls, within_backward
from condzoo.probe.views import watch_gradient
from condzoo.probe.wrappers import named_modules

Module = TypeVar("Module", bound=nn.Module)

SEEN: dict[str, Callable[[], Any]] = {  # what a Capture records -> nothing recorded yet
    "sums": dict,
    "neurons": dict,
    "dtypes": set,
    "origin": Origin,
    "_calls": Calls,
}


@dataclass(eq=False)
class Capture:
    """Running sums of the chosen layers of one model; attached by `attach`, freed by `detach`.

    Attributes:
        model: the network.
        layers: layers to read, by name.
        relus: ReLU modules to count, by name.
        attentions: modules whose inner projections are among the layers, by name.
        kappa: full spectra are wanted, not the largest eigenvalues alone.
        counts_neurons: count units of the `relus`, and of ReLUs called as functions.
        recording: read forwards at all.
        repeats: read forwards within a backward pass in any case: they repeat one that was recorded.
        gradients: read the gradients of the backwards that follow.
        further: the gradient is one more class of rows already counted.
        trains: of a `Probe`, which reads training steps: the passes of a measurement at rest are not its.
        split: layers to leave alone, since no process sees the whole of them.
        on_gradient: called before a gradient is read.
        batch: samples of the current batch.
        scale: what an output gradient is multiplied by: the batch, for a loss that is its mean.
        idle: no layer was called since this batch began.
        sums: by layer name, in the order of their first call.
        neurons: by the ReLU's name, its further calls within a forward by that name and "#1", "#2", ...
        dtypes: of the layers' outputs.
        origin: where NaN or Inf appeared first in a forward pass.
        modules: of the model, by name, as it was last looked at.
        functions: what the network calls as a function.
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    relus: dict[str, nn.Module]
    attentions: dict[str, nn.MultiheadAttention] = field(default_factory=dict)
    conv: Conv = "channels"
    precision: Precision = "auto"
    bias: bool = False
    kappa: bool = True
    counts_neurons: bool = True
    recording: bool = True
    repeats: bool = False
    gradients: bool = True
    further: bool = False
    trains: bool = False
    split: set[str] = field(default_factory=set)
    on_gradient: Callable[[], None] | None = None
    batch: int = 0
    scale: float = 1.0
    idle: bool = True
    sums: dict[str, LayerSums] = field(default_factory=dict)
    neurons: dict[str, RunningNeurons] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)
    origin: Origin = field(default_factory=Origin)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    functions: FunctionCalls = field(init=False)
    _products: InnerProducts = field(default_factory=InnerProducts)
    _shared: SharedProducts = field(default_factory=SharedProducts)
    _outer: list[RemovableHandle] = field(default_factory=list)
    _inner: list[RemovableHandle] = field(default_factory=list)
    _calls: Calls = field(default_factory=Calls)
    _relu_calls: ReluCalls = field(default_factory=ReluCalls)

    def __post_init__(self) -> None:
        """The mode that sees ReLUs and layers that are called as functions."""
        count, read = partial(apart, self._count_units), partial(apart, self._on_layer)
        self.functions = FunctionCalls(self.layers, count, read, self._products.note)

    def look_at(self, layers: dict[str, nn.Module]) -> None:
        """Read these layers and all ReLUs and attentions that the model has now; for while the hooks are off."""
        self.modules = dict(named_modules(self.model))
        refill(self.layers, layers)
        refill(self.relus, {name: m for name, m in self.modules.items() if isinstance(m, RELUS)})
        refill(self.attentions, {name: m for name, m in self.modules.items() if isinstance(m, nn.MultiheadAttention)})

    def attach(self) -> None:
        """Put the hooks on."""
        stop_interrupted()
        self._hook(self._outer, inside=False)
        self._hook(self._inner, inside=True)

    def follow(self, layers: dict[str, nn.Module]) -> None:
        """Read these layers, for a model that changed, from within a call of it.

        The hooks on the model itself stay: those around its call have begun.
        """
        remove(self._inner)
        self.look_at(layers)
        self._hook(self._inner, inside=True)

    def _hook(self, handles: list[RemovableHandle], *, inside: bool) -> None:
        """Hooks on all modules inside the model, or on the model, whose name is empty.

        Held from the first one on: Ctrl-C may end this anywhere.
        """
        for name, module in _side(self.layers, inside):
            hook = Hook(partial(self._on_call, name), module)  # before a hook of the user's that changes h
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            if has_own_forward(module):
                handles.append(module.register_forward_pre_hook(Hook(partial(self._products.begin, name), module)))
        for name, attention in _side(self.attentions, inside):
            handles += watch(name, attention, self._on_projection)
        for name, module in _side(self.modules, inside):
            if self.counts_neurons or name not in self.relus:
                handles += self.functions.watch(name, module)
            if self.counts_neurons and name in self.relus:
                handles.append(module.register_forward_hook(Hook(partial(self._on_relu, name), module)))
            elif self.counts_neurons and is_measured(module) and name not in self.layers:
                handles.append(module.register_forward_hook(Hook(self._relu_calls.note_layout, module)))

    def begin(self, samples: int, scale: float) -> None:
        """A forward pass over `samples` samples follows, its gradients to be multiplied by `scale`."""
        self.origin.next_pass()
        self.batch, self.scale, self.idle = samples, scale, True
        self._relu_calls.begin()
        self._shared.clear()  # the same tensor may hold another batch: numpy fills memory without its version changing

    def detach(self) -> None:
        """Take the hooks off, and what they put on if they did not get to end it; graphs still alive do not record."""
        self.recording = self.repeats = self.gradients = False
        remove(self._outer)
        remove(self._inner)
        self.functions.stop()
        self._products.clear()
        self._shared.clear()
        stop(self._on_projection)

    def clear(self) -> None:
        """Forget everything seen, for the next measurement."""
        vars(self).update({key: empty() for key, empty in SEEN.items()})

    def snapshot(self) -> Callable[[], None]:
        """What undoes all that will be recorded from here on, should the forward pass that follows raise."""
        own = {key: copy(getattr(self, key)) for key in SEEN}
        parts = [part for sums in self.sums.values() for part in (sums, sums.input, sums.output_grad)]
        before = [(part, copy(vars(part))) for part in (*parts, *self.neurons.values(), self._relu_calls)]
        return partial(_put_back, [(self, own), *before])

    def _on_call(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Any) -> None:
        with torch._C.DisableTorchFunction():  # else the modes that are on see every look at a tensor
            for call in self._products.calls(name, module, called_on(args, kwargs), h):
                self._on_layer(name, module, *call)

    def _on_layer(self, name: str, module: nn.Module, x: Any, h: Any, watch: Watch = None, why: str = "") -> None:
        """Read a call. watch: has the gradients of h read, if h itself is not to; why: it cannot be read."""
        if name in self.split or (batch := self._reads(name)) is None:
            return
        sums = self._of_called(name)
        sums.samples += 0 if batch.again else batch.samples
        if hidden := why or unreadable(module, x, h):
            sums.hidden = f"{hidden}: its rows are not seen"
            return
        self.dtypes.add(h.dtype)
        self._relu_calls.note_layout(module, x, h)
        if (seen := x if self.conv == "channels" else padded_inside(module, x, h)) is None:
            sums.hidden = f"{type(module).__name__} pads its input in a way of its own: its patches are not seen"
            return
        if not batch.again:
            with plain_products(x.device.type):
                bias = self.bias and has_bias(module)
                add_input(sums.input, module, seen, self.conv, self.precision, bias=bias, shared=self._shared)
            if not sums.input.finite:
                self.origin.find(name)
            self.origin.passed(name, h, whole=not self.trains)
        if h.requires_grad:
            read = partial(apart, self._on_gradient, module, sums.output_grad, batch.scale)
            watch_gradient(h, read) if watch is None else watch(read)

    def _on_projection(self, name: str, layer: nn.Module, x: Tensor, h: Tensor) -> None:
        inside, _, local = name.rpartition(".")
        is_part = local != "out_proj" and f"{inside}.in_proj".lstrip(".") in self.layers
        if name in self.layers or is_part:
            self.layers.setdefault(name, layer)  # a part of a packed weight is known only once it is used
            apart(self._on_layer, name, layer, x, h)

    def _on_gradient(self, module: nn.Module, moment: RunningMoment, scale: float, grad_h: Tensor) -> None:
        if not self.gradients:
            return
        if self.on_gradient is not None:
            self.on_gradient()
        with plain_products(grad_h.device.type):
            for columns in output_columns(module, grad_h.detach()):
                moment.add(columns, self.precision, scale, new_rows=not self.further)

    def _on_relu(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._count_units(name, output, linear_range(module, output.dtype))

    def _count_units(self, name: str, output: Tensor, linear: LinearRange) -> None:
        if self.counts_neurons and output.ndim >= 2 and self._reads(name, at_once=True) is not None:
            self._relu_calls.add(self.neurons, name, output, linear)

    def _reads(self, name: str, *, at_once: bool = False) -> Batch | None:
        """The batch of this call if it is recorded: in training, and no repetition of one that was (checkpointing)."""
        if not (self.recording or (self.repeats and within_backward())) or (self.trains and at_rest()):
            return None
        self.idle = self.idle and within_backward()
        batch = self._calls.counts(name, Batch(self.batch, self.scale), at_once=at_once)
        if batch is None and not (at_once or within_backward()):
            self.sums.setdefault(name, LayerSums())  # its place, if a repetition alone has gradients
        return batch

    def _of_called(self, name: str) -> LayerSums:
        """A layer's sums; the place of its calls without gradients is for their repetition alone."""
        if name in self.sums and not (self.sums[name].samples or within_backward() or self._calls.waits(name)):
            del self.sums[name]
        return self.sums.setdefault(name, LayerSums())


def _side(modules: Mapping[str, Module], inside: bool) -> list[tuple[str, Module]]:
    """Those inside the model, or the model itself, whose name is empty."""
    return [(name, module) for name, module in modules.items() if bool(name) == inside]


def _put_back(kept: list[tuple[Any, dict[str, Any]]]) -> None:
    for holder, values in kept:
        vars(holder).update(values)


def refill(held: dict[str, Module], found: Mapping[str, Module]) -> None:
    """Put other entries into a dict that others hold, too."""
    held.clear()
    held.update(found)


def capture_of(
    model: nn.Module,
    layers: dict[str, nn.Module],
    *,
    conv: str = "channels",
    precision: str = "auto",
    bias: bool = False,
    kappa: bool = True,
    neurons: bool = True,
    trains: bool = False,
) -> Capture:
    """A capture of these layers and, with `neurons`, of all ReLUs of the model.

    Raises:
        ValueError: an unknown `conv` or `precision`.
    """
    checked("conv", conv, CONVS)
    checked("precision", precision, PRECISIONS)
    if not kappa and precision == "auto":
        precision = "fast"  # float64 products are for small eigenvalues
    settings: dict[str, Any] = {"conv": conv, "precision": precision}
    capture = Capture(model, {}, {}, bias=bias, kappa=kappa, counts_neurons=neurons, trains=trains, **settings)
    capture.look_at(layers)
    return capture
