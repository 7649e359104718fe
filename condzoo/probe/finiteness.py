"""NaN and Inf in a network's output, its loss or its gradients, of which there is no curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def checked_finite(value: Any, what: str = "the network's output") -> Any:
    """The value; of an output -inf passes, which masks a class.

    Raises:
        ValueError: it is a tensor that holds NaN or Inf.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        wrong = value.isnan() | (value == torch.inf)
        if bool(wrong.any()):
            raise ValueError(nonfinite(what))
    return value


def nonfinite(what: str) -> str:
    """That this holds NaN or Inf, and how to find where it comes from."""
    return f"{what} holds NaN or Inf; condzoo.measure(...).first_nonfinite names the layer where it appears first"
