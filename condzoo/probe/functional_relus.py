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
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from condzoo.probe.hooks import Hook
from condzoo.probe.neurons import OF_RELU, OF_RELU6, RELUS
from condzoo.probe.wrappers import named_modules

Report = Callable[[str, Tensor, tuple[float, float]], None]

FUNCTIONS: dict[Any, tuple[str, tuple[float, float]]] = {
    F.relu: ("relu()", OF_RELU),
    torch.relu: ("relu()", OF_RELU),
    torch.relu_: ("relu()", OF_RELU),
    torch.Tensor.relu: ("relu()", OF_RELU),
    torch.Tensor.relu_: ("relu()", OF_RELU),
    F.relu6: ("relu6()", OF_RELU6),
}


class _Calls(TorchFunctionMode):
    """Reports outputs of FUNCTIONS under the name of the module that runs, with the function's at the end."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report
        self.running: list[tuple[str, nn.Module]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in FUNCTIONS and self.running:
            name, module = self.running[-1]
            if not isinstance(module, RELUS):  # those are counted by their own hooks
                local, linear = FUNCTIONS[func]
                self.report(f"{name}.{local}" if name else local, output, linear)
        return output


def watch_functions(model: nn.Module, report: Report) -> list[RemovableHandle]:
    """Report (name, output, linear range) of each functional ReLU while `model` runs forward."""
    calls = _Calls(report)
    handles: list[RemovableHandle] = []
    for name, module in named_modules(model):
        inner = type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
        if inner and module is not model and not isinstance(module, RELUS):
            continue  # torch's own layers call no ReLU
        if isinstance(module, torch.jit.ScriptModule):
            continue  # runs outside Python, and takes no such hooks

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            if not calls.running:
                calls.__enter__()
            calls.running.append((name, module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not calls.running or calls.running[-1][1] is not module:
                return  # another hook raised before this module was entered
            calls.running.pop()
            if not calls.running:
                calls.__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(Hook(enter)))
        handles.append(module.register_forward_hook(Hook(leave), always_call=True, prepend=True))  # last in, first out
    return handles
