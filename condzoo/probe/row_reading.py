"""A layer's inputs by sample and position, read as the network runs; the half of `LayerRows` that needs no gradient.

Shapes: N samples, T positions, g groups.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from condzoo.probe.calls import called_on, unreadable
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import CONVOLUTIONS
from condzoo.probe.patches import padded_inside, unfolded
from condzoo.probe.repetitions import within_backward
from condzoo.probe.views import shown


def read(rows: LayerRows, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Any) -> None:
    """Add a call of a layer to its rows, in a forward hook; where they are not the samples', it says so there."""
    if rows.fault or within_backward():
        return  # activation checkpointing repeats a forward pass that was read
    if isinstance(h, Tensor) and not h.requires_grad:
        return  # under torch.no_grad: nothing flows back through this call
    x = called_on(args, kwargs)
    rows.fault = _unfit(module, x, h, rows.samples)
    seen = None if rows.fault else padded_inside(module, x.detach(), h)
    if seen is None:
        rows.fault = rows.fault or f"a {type(module).__name__}, which pads its input in a way of its own"
        rows.inputs.clear()
        rows.edges.clear()
        return
    rows.inputs.append(_positions_of_input(module, seen, rows.samples))
    rows.edges.append(get_gradient_edge(shown(h)))


def _unfit(module: nn.Module, x: Any, h: Any, samples: int) -> str:
    """What kind of layer this is, if its gradients are not of rows by sample; else empty."""
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return f"a {type(module).__name__}"
    if any(p is not None for key, p in module._parameters.items() if key not in ("weight", "bias")):
        return "a layer with parameters of its own beside weight and bias"
    if (why := unreadable(module, x, h)) is not None:
        return why
    alone = x.ndim < module.weight.ndim  # one row, or one image: there is no first dimension
    if alone or x.shape[0] % samples or (x.ndim > 2 and x.shape[0] != samples == x.shape[1]):
        return (
            f"a layer that reads an input {list(x.shape)}, whose rows cannot be told apart by sample (the first "
            f"dimension must be the {samples} samples)"
        )
    return ""


def _positions_of_input(module: nn.Module, x: Tensor, samples: int) -> Float[Tensor, "n g t d"]:
    if isinstance(module, nn.Linear):
        return x.reshape(samples, 1, -1, x.shape[-1])
    assert isinstance(module, CONVOLUTIONS)
    return by_sample(torch.cat([part.mT for part in unfolded(x, module)]), samples)


def by_sample(positions: Float[Tensor, "m g t d"], samples: int) -> Float[Tensor, "n g s d"]:
    """m = n * k and s = k * t where a sample's k images (frames, windows) follow each other in the batch."""
    return positions.unflatten(0, (samples, -1)).transpose(1, 2).flatten(2, 3)
