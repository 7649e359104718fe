"""Layer outputs that are views: F.linear on [n, t, d] makes a product [n * t, d], and shows it as [n, t, d].

An operation in place on such a view, or on another of the same product, gives the product a new history, in which the
view has no part: no gradient comes to what hangs on the view. The product's own past stays in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from condzoo.probe.calls import of_transform


def shown(h: Tensor) -> Tensor:
    """The tensor of which h shows all elements, in their order; h itself where there is none.

    Its gradient, reshaped, is that of h as it is now, whatever is done in place afterwards.
    """
    base = h._base
    if base is None or not base.requires_grad or base.numel() != h.numel():
        return h
    return base if base.is_contiguous() and h.is_contiguous() else h


def watch_gradient(h: Tensor, read: Callable[[Tensor], None]) -> None:
    """Have each gradient of h, as it is now, read.

    None where a function behind it passes None back, as DDP's may; nor many at once, of a backward pass inside vmap.
    """
    watched = shown(h)
    watched.register_hook(partial(_look, read, None if watched is h else h.shape))


def _look(read: Callable[[Tensor], None], shape: torch.Size | None, grad: Tensor | None) -> None:
    """Have a gradient read, in another shape where one is given."""
    if grad is not None and not of_transform(grad):
        read(grad if shape is None else grad.reshape(shape))
