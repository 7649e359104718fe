"""Tensors that say they are on a GPU, where none is; the values are on the CPU, and so is the arithmetic."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

CPU = torch.device("cpu")
aten = torch.ops.aten
REFUSED = {aten._linalg_eigh.default, aten.nonzero.default}


def _refused(tensor: Tensor, *_: Any) -> Any:
    raise AssertionError("a number is read on a GPU")


class OnGPU(Tensor):
    """A tensor of "cuda:0": `.cpu()` gives its values, reading or decomposing it is an AssertionError."""

    __float__ = __int__ = __bool__ = item = tolist = _refused

    @staticmethod
    def __new__(cls, values: Tensor, device: str = "cuda:0") -> "OnGPU":
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=device
        )
        return made

    def __init__(self, values: Tensor, device: str = "cuda:0") -> None:
        self.values_there = values

    def __getitem__(self, key: Any) -> "OnGPU":  # torch's own asks CUDA's driver first
        return OnGPU(self.values_there[key])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in REFUSED, f"{func} on a GPU"
        leaves = func is aten._to_copy.default and (kwargs or {}).get("device") == CPU
        args, kwargs = tree_map(_inner, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return found if leaves else tree_map(lambda part: cls(part) if isinstance(part, Tensor) else part, found)


def _inner(value: Any) -> Any:
    if isinstance(value, OnGPU):
        return value.values_there
    return CPU if isinstance(value, torch.device) else value
