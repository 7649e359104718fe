"""Random numbers of a network's float64 copy, which are those that the network itself draws.

`torch.randn_like(h)` draws other numbers in another dtype, from a stream in the same state: what noise inside the
network (a VAE's, stochastic depth) would add to the difference of the two is none of the dtype's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DRAWS: frozenset[Callable[..., Any]] = frozenset({
    *(torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.normal, torch.bernoulli, Tensor.bernoulli),
})  # fmt: skip
IN_PLACE: frozenset[Callable[..., Any]] = frozenset(
    getattr(Tensor, name)
    for name in ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "uniform_")
)
DROPOUTS: frozenset[Callable[..., Any]] = frozenset({F.dropout, F.dropout1d, F.dropout2d, F.dropout3d})


class NarrowDraws(TorchFunctionMode):
    """Inside, what would be drawn in float64 is drawn in another dtype, and widened.

    Draws from a generator of the caller's own, those of torch's kernels (dropout in fused attention) and of functions
    that draw inside of torch's (`F.gumbel_softmax`) stay as they are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("dtype") or torch.float64
        wide = asked == torch.float64 and any(map(_in_float64, (*args, *kwargs.values())))
        if not wide or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in DRAWS and kwargs.get("out") is None:
            return func(*map(self._narrow, args), **{k: self._narrow(v) for k, v in kwargs.items()}).double()
        if func in IN_PLACE:
            drawn = func(torch.empty_like(args[0], dtype=self.dtype), *map(self._narrow, args[1:]), **kwargs)
            return args[0].copy_(drawn)
        if func in DROPOUTS:
            return self._dropped(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _narrow(self, value: Any) -> Any:
        if not _in_float64(value):
            return value
        return value.to(self.dtype) if isinstance(value, Tensor) else self.dtype

    def _dropped(
        self, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or not 0 < p < 1:
            return func(input, p, training, inplace)
        kept = func(torch.ones_like(input, dtype=self.dtype), p, True) != 0
        return input.mul_(kept / (1 - p)) if inplace else input * (kept / (1 - p))


def narrow_draws(model: nn.Module) -> NarrowDraws:
    """For a float64 copy of this model: draws are in the dtype of its first parameter."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return NarrowDraws(next(dtypes, torch.get_default_dtype()))


def _in_float64(value: Any) -> bool:
    return value is torch.float64 or (isinstance(value, Tensor) and value.dtype == torch.float64)
