"""ReLUs that are called as functions (`F.relu`, `torch.relu`, `x.relu_()`, `F.relu6`), which no hook sees.

While the network's forward runs, a torch-function mode sees every call of these functions; hooks on the modules
around say which one made it. `clamp` and `maximum` are not taken for ReLUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

from condzoo.probe.hooks import Hook
from condzoo.probe.neurons import OF_RELU, OF_RELU6, RELUS, LinearRange

Report = Callable[[str, Tensor, LinearRange], None]

FUNCTIONS: dict[Any, tuple[str, LinearRange]] = {
    F.relu: ("relu()", OF_RELU),
    torch.relu: ("relu()", OF_RELU),
    torch.relu_: ("relu()", OF_RELU),
    torch.Tensor.relu: ("relu()", OF_RELU),
    torch.Tensor.relu_: ("relu()", OF_RELU),
    F.relu6: ("relu6()", OF_RELU6),
}


class FunctionalRelus(TorchFunctionMode):
    """Reports (name, output, linear range) of functional ReLUs.

    The name is that of the module that runs, with the function's at the end.
    """

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report
        self.running: list[tuple[str, nn.Module]] = []
        self.below: list[TorchFunctionMode] = []  # the modes that were on when this one was entered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in FUNCTIONS and self.running:
            name, module = self.running[-1]
            if not isinstance(module, RELUS):  # those are counted by their own hooks
                local, linear = FUNCTIONS[func]
                self.report(f"{name}.{local}" if name else local, output, linear)
        return output

    def watch(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        """Know when this module runs; while any does that is watched, calls are reported."""
        if isinstance(module, torch.jit.ScriptModule):
            return []  # runs outside Python, and takes no such hooks
        if name and _calls_none(module):
            return []

        def enter(module: nn.Module, args: Any) -> None:
            if not self.running:
                self.below = _get_current_function_mode_stack()
                self.__enter__()
            self.running.append((name, module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self.running or self.running[-1][1] is not module:
                return  # another hook raised before this module was entered
            self.running.pop()
            if not self.running:
                self.__exit__(None, None, None)

        return [
            module.register_forward_pre_hook(Hook(enter)),
            module.register_forward_hook(Hook(leave), always_call=True, prepend=True),  # last in, first out
        ]

    def stop(self) -> None:
        """Take the mode off if it is still on: what is no `Exception` (KeyboardInterrupt) passes by the hooks."""
        on = _get_current_function_mode_stack()
        if any(mode is self for mode in on):
            above = []
            while (mode := _pop_mode()) is not self:
                above.append(mode)
            for mode in reversed(above):
                _push_mode(mode)
        elif self.running and on and on == self.below[: len(on)]:
            _pop_mode()  # a mode around has ended since, and took off the topmost one, which was this, for itself
        self.running.clear()
        self.below.clear()


def _calls_none(module: nn.Module) -> bool:
    """Whether this is a layer of torch's own, which calls no ReLU."""
    inner = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
    return inner and not isinstance(module, RELUS)
