"""The product inside a layer whose class has a forward of its own, which may do more than multiply.

Detectron2's convolutions and torch's for quantization-aware training have a norm or an activation behind the product,
BitNet's linear layers a norm before it. Others pad, cast, reshape or cut off, quantize or standardize their weight, or
add a low-rank path. x and h are what the product reads and gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from condzoo.probe.calls import unreadable, weight_now
from condzoo.probe.layers import CHANNELS_FIRST
from condzoo.probe.views import watch_gradient

Read = Callable[[Tensor], None]
Watch = Callable[[Read], None] | None

REARRANGING = {  # what autograd calls the functions that leave values as they are, up to rounding
    f"{name}Backward0"
    for name in (
        *("Alias", "AsStrided", "Clone", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes"),
        *("Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"),
        *(f"FakeQuantizePer{kind}AffineCachemask" for kind in ("Tensor", "Channel")),
        *("FakeQuantizePerTensorAffineCachemaskTensorQparams", "FusedMovingAvgObsFqHelper"),
    )
} | {"SqueezeBackward1", "SqueezeBackward2", "TransposeBackward1"}


class Call(NamedTuple):
    """What is to be read of a layer's call: x, h, what has h's gradients read if not h itself, or why nothing is."""

    x: Any
    h: Any
    watch: Watch = None
    why: str = ""


@dataclass(eq=False)
class Gradients:
    """Passes gradients on to what is to read them, once that is known."""

    read: Read | None = None

    def __call__(self, grad: Tensor) -> None:
        """Pass one on."""
        if self.read is not None:
            self.read(grad)


@dataclass(eq=False)
class Product:
    """One call of F.linear or F.conv*, or `x @ W.T`; `node` made h, whatever is done to it in place afterwards."""

    x: Tensor
    h: Tensor
    of_own: bool
    node: Any
    gradients: Gradients = field(default_factory=Gradients)


class InnerProducts:
    """Notes the products of the layers that run now, and says at the end of each what is to be read of it."""

    def __init__(self) -> None:
        self._products: dict[str, list[Product]] = {}

    def begin(self, name: str, *_: Any) -> None:
        """A call of this layer begins."""
        self._products[name] = []

    def note(self, name: str, module: nn.Module, x: Tensor, h: Tensor, weight: Tensor) -> None:
        """A product within it; those without a graph, as a function with a backward of its own makes, are no part."""
        if name not in self._products or unreadable(module, x, h) is not None or h.grad_fn is None:
            return
        own = weight_now(module)
        of_own = own is not None and _is_made_of(weight, own)
        if of_own or own is None or weight.shape == own.shape:
            product = Product(x, h, of_own, h.grad_fn)
            watch_gradient(h, product.gradients)  # now: what follows may change h in place
            self._products[name].append(product)

    def calls(self, name: str, module: nn.Module, x: Any, h: Any) -> list[Call]:
        """What to read of the call that ends: its products with the layer's own weight.

        Where there are none, the one with a weight that is computed from it; else, as of torch's own classes, what the
        layer itself reads and gives.
        """
        products = self._products.pop(name, [])
        own = [product for product in products if product.of_own]
        chosen = own or (products if len(products) == 1 else [])
        return [_call(product, module, x, h) for product in chosen] or [Call(x, h)]

    def clear(self) -> None:
        """Forget the layers that have raised."""
        self._products.clear()


def _call(product: Product, module: nn.Module, x: Any, h: Any) -> Call:
    kept = isinstance(h, Tensor) and _is_rearranged(h, product.node)
    if not kept and not product.of_own:  # with a weight scaled by a norm's factor, say: which h is meant is not known
        return Call(x, h, why=f"a {type(module).__name__} whose output is changed inside its forward")
    is_padded = isinstance(module, CHANNELS_FIRST) and isinstance(x, Tensor) and product.x.numel() > x.numel()
    read = x if is_padded else product.x  # padding is no input of the layer's
    if kept and h.numel() < product.h.numel():
        return Call(read, h)  # the rest, behind a causal convolution's last output, is no output
    return Call(read, product.h, watch=partial(setattr, product.gradients, "read"))


def _is_made_of(weight: Tensor, own: Tensor) -> bool:
    """Whether this is a layer's weight, or a view, cast or quantization of it."""
    if weight is own or weight._base is own:
        return True
    return own.requires_grad and _is_rearranged(weight, get_gradient_edge(own).node)


def _is_rearranged(tensor: Tensor, source: Any) -> bool:
    """Whether all that happened since this node is views, casts, copies and rounding."""
    node: Any = tensor.grad_fn
    while node is not None and node is not source and node.name() in REARRANGING:
        node = node.next_functions[0][0]
    return node is source
