"""What a network calls as a function, which no hook sees: ReLUs, F.linear on the weight of a layer, and its F.conv*.

While the network's forward runs, a torch-function mode sees every call of `F.relu`, `torch.relu`, `x.relu_()`,
`F.relu6`, `F.linear`, `F.conv*` and, inside layers with a forward of their own, `x @ weight.T`; hooks on the modules
around say which one made it. `clamp` and `maximum` are not taken for ReLUs, nor is `x @ layer.weight.T` elsewhere for a
call of the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from condzoo.probe.calls import weight_now
from condzoo.probe.hooks import Hook
from condzoo.probe.layers import has_own_forward
from condzoo.probe.neurons import OF_RELU, OF_RELU6, RELUS, LinearRange

OnRelu = Callable[[str, Tensor, LinearRange], None]
OnLayer = Callable[[str, nn.Module, Tensor, Tensor], None]
OnProduct = Callable[[str, nn.Module, Tensor, Tensor, Tensor], None]

LINEAR: Any = torch._C._nn.linear  # F.linear, even where another function stands in its place (`attention` puts one)
CONVOLVING = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
PRODUCTS: set[Any] = {LINEAR, *CONVOLVING}
OF_MATRICES: set[Any] = {  # whose last two arguments are x and the weight as [in, out]
    *(torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm, torch.addmm, torch.Tensor.addmm)
}
CALLS_OF_THEIR_OWN = (nn.Linear, nn.MultiheadAttention)  # whose calls of F.linear are read by other hooks

RELU_FUNCTIONS: dict[Any, tuple[str, LinearRange]] = {
    F.relu: ("relu()", OF_RELU),
    torch.relu: ("relu()", OF_RELU),
    torch.relu_: ("relu()", OF_RELU),
    torch.Tensor.relu: ("relu()", OF_RELU),
    torch.Tensor.relu_: ("relu()", OF_RELU),
    F.relu6: ("relu6()", OF_RELU6),
}


class FunctionCalls:
    """Reports (name, output, linear range) of functional ReLUs, and (name, layer, input, output) of functional layers.

    A ReLU's name is that of the module that runs, with the function's at the end; a layer's is its own. Of the products
    inside a layer with a forward of its own it reports (name, layer, input, output, weight).

    Args:
        layers: by name; may change.
        on_relu, on_layer, on_product: what is reported to.

    Attributes:
        batch_statistics: an F.batch_norm has computed statistics of the batch.
        on_weight: is told (name, weight) of a functional layer.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], on_relu: OnRelu, on_layer: OnLayer, on_product: OnProduct
    ) -> None:
        self.layers, self.on_relu, self.on_layer, self.on_product = layers, on_relu, on_layer, on_product
        self.batch_statistics = False
        self.on_weight: Callable[[str, Tensor], None] | None = None
        self.running: list[tuple[str, nn.Module]] = []
        self.below: list[TorchFunctionMode] = []  # the modes that were on when its own was entered
        self._mode: _Mode | None = None  # while it is on

    def see(self, func: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A function was called."""
        if not self.running:
            return
        if func in RELU_FUNCTIONS:
            name, module = self.running[-1]
            if not isinstance(module, RELUS):  # those are counted by their own hooks
                local, linear = RELU_FUNCTIONS[func]
                self.on_relu(f"{name}.{local}" if name else local, output, linear)
        elif on_batch_statistics(func, kwargs):
            self.batch_statistics = True
        elif func in PRODUCTS:
            self._product(func, output, *args[:2], **{key: kwargs[key] for key in ("input", "weight") if key in kwargs})
        elif func in OF_MATRICES and len(args) >= 2 and args[-1].ndim == 2:
            self._product(func, output, args[-2], args[-1].mT)

    def _product(self, func: Any, h: Tensor, input: Tensor, weight: Tensor) -> None:
        name, module = self.running[-1]
        if self.layers.get(name) is module:
            if has_own_forward(module):
                self.on_product(name, module, input, h, weight)
        elif func is LINEAR:
            self._linear(h, input, weight)

    def _linear(self, h: Tensor, input: Tensor, weight: Tensor) -> None:
        if any(isinstance(module, CALLS_OF_THEIR_OWN) for _, module in self.running):
            return
        layers = {n: m for n, m in self.layers.items() if isinstance(m, nn.Linear) and weight_now(m) is weight}
        if layers:  # of several that share the weight, one inside the module that runs
            own = f"{self.running[-1][0]}.".lstrip(".")
            name = next((name for name in layers if name.startswith(own)), next(iter(layers)))
            if self.on_weight is not None:
                self.on_weight(name, weight)
            self.on_layer(name, layers[name], input, h)

    def watch(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Know when this module runs; while any does that is watched, calls are reported. Hooks come one by one."""
        if isinstance(module, torch.jit.ScriptModule):
            return  # runs outside Python, and takes no such hooks
        if name and _calls_none(module):
            return

        enter, leave = Hook(partial(self._enter, name), module), Hook(self._leave, module)
        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, always_call=True, prepend=True)  # last in, first out

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        if not self.running:
            self.below = _get_current_function_mode_stack()
            self._mode = _Mode(self)
            self._mode.__enter__()
        self.running.append((name, module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.running or self.running[-1][1] is not module:
            return  # another hook raised before this module was entered
        self.running.pop()
        if not self.running and self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def interrupted(self) -> bool:
        """Whether its mode stayed on after a call that is over: what is no `Exception` passes by the hooks."""
        return self.running != [] and not _runs(self.running[0][1])

    def stop(self) -> None:
        """Take the mode off if it is still on: what is no `Exception` (KeyboardInterrupt) passes by the hooks."""
        on = _get_current_function_mode_stack()
        if self._mode is not None and any(mode is self._mode for mode in on):
            _take_off(self._mode)
        elif self.running and on and on == self.below[: len(on)]:
            _pop_mode()  # a mode around has ended since, and took off the topmost one, which was this, for itself
        self._mode = None
        self.running.clear()
        self.below.clear()


class _Mode(TorchFunctionMode):
    """Sees every function for a FunctionCalls, which it holds weakly: left on by Ctrl-C it keeps no network alive."""

    def __init__(self, calls: FunctionCalls) -> None:
        super().__init__()
        self.calls = ref(calls)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if (calls := self.calls()) is not None:
            calls.see(func, output, args, kwargs)
        return output


def stop_interrupted() -> None:
    """Take off the modes that Ctrl-C left on, of networks that are gone or that nobody has closed a Probe of."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, _Mode):
            calls = mode.calls()
            if calls is None:
                _take_off(mode)
            elif calls.interrupted():
                calls.stop()


def _take_off(mode: TorchFunctionMode) -> None:
    """Take one mode off that is on, whatever is above it."""
    above = []
    while (last := _pop_mode()) is not mode:
        above.append(last)
    for last in reversed(above):
        _push_mode(last)


def _runs(module: nn.Module) -> bool:
    """Whether a call of this module is under way here."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


class BatchStatistics(TorchFunctionMode):
    """Notes in `seen` whether there was an F.batch_norm inside that computed statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen = self.seen or on_batch_statistics(func, kwargs)
        return func(*args, **kwargs)


def on_batch_statistics(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether this is an F.batch_norm that computes statistics of the batch; torch hands `training` on by name."""
    return func is F.batch_norm and bool(kwargs.get("training"))


def _calls_none(module: nn.Module) -> bool:
    """Whether this is a layer of torch's own, which calls neither a ReLU nor F.linear."""
    inner = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
    return inner and not isinstance(module, (*RELUS, nn.Linear))
