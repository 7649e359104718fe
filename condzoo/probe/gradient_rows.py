"""Per-sample gradients of every layer as factors: rows x and g at each position, never a P-vector a sample.

A layer's gradient for sample n is sum_t g_nt x_nt^T over its positions t (and sum_t g_nt for its bias).
Shapes: N samples, K label draws a sample (1 with labels from the data), T positions, V = K * N vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from condzoo.probe.batches import batch_size, call
from condzoo.probe.calls import called_on, unreadable
from condzoo.probe.label_draws import equivalent_draws, few_enough
from condzoo.probe.label_models import (
    ONE_BY_ONE,
    checked_distribution,
    class_axis,
    gradients_one_by_one,
    weighted_gradients,
)
from condzoo.probe.layers import CONVOLUTIONS, samples_interact
from condzoo.probe.losses import Loss, logits_of, mean_loss
from condzoo.probe.patches import padded_inside, unfolded
from condzoo.probe.repetitions import within_backward
from condzoo.probe.views import shown

ELSEWHERE = "a layer whose weight is used otherwise than by its own call"
SAME = 1e-6  # rounding between two ways to a gradient in float64, relative
SAMPLES = 64  # samples whose gradients are formed at a time


class Unfactored(ValueError):
    """A layer has no such rows; `sample_gradients` may have its gradients all the same."""


@dataclass(eq=False)
class LayerRows:
    """One layer's factors.

    Attributes:
        name: the layer's.
        bias: whether it has one.
        width: d_out / groups.
        inputs: a tensor [N, groups, T, d_in / groups] for each call of the layer.
        grads: for each label draw, a tensor [N, groups, T, d_out / groups] a call.
        samples: N.
        whole: whether the weight's gradient is the sum of these rows; else another layer, or none, uses it, too.
        edges: where in the graph each call's output is.
    """

    name: str
    bias: bool
    width: int
    samples: int
    whole: bool = True
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)

    @property
    def vectors(self) -> int:
        """V, per-sample gradients in all."""
        return len(self.grads) * self.samples

    def dense(self, which: slice) -> Float[Tensor, "v p"]:
        """The gradients themselves, of vectors `which` in the order draw by draw: weight, then bias."""
        x = torch.cat(self.inputs, dim=2)
        parts = []
        for draw, indices in self._within(which):
            g = torch.cat(self.grads[draw], dim=2)[indices]
            weight = torch.einsum("ngto,ngti->ngoi", g, x[indices]).flatten(1)
            parts.append(torch.cat([weight, g.sum(2).flatten(1)], dim=1) if self.bias else weight)
        return torch.cat(parts)

    @property
    def single_position(self) -> bool:
        """Whether every sample is one row: a linear layer on [N, d], called once."""
        return len(self.inputs) == 1 and self.inputs[0].shape[1:3] == (1, 1)

    @property
    def parameters(self) -> int:
        """P of this layer: weights and biases."""
        x = self.inputs[0]
        return x.shape[1] * self.width * (x.shape[3] + (1 if self.bias else 0))

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.inputs[0].device

    def times(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " v"]:
        """Inner products of all gradients with a vector, without forming them."""
        x, shape = torch.cat(self.inputs, dim=2), (self.grads[0][0].shape[1], self.grads[0][0].shape[3], -1)
        count = shape[0] * shape[1] * x.shape[3]
        image = torch.einsum("ngti,goi->ngto", x, vector[:count].reshape(shape))
        if self.bias:
            image = image + vector[count:].reshape(shape[:2])[None, :, None]
        return torch.cat([(torch.cat(g, dim=2) * image).sum((1, 2, 3)) for g in self.grads])

    def transposed_times(self, inner: Float[Tensor, " v"]) -> Float[Tensor, " p"]:
        """The sum of all gradients, each times its number."""
        x = torch.cat(self.inputs, dim=2)
        scaled = [
            torch.cat(g, dim=2) * part[:, None, None, None]
            for g, part in zip(self.grads, inner.split(self.samples), strict=True)
        ]
        total = torch.stack(scaled).sum(0)
        weight = torch.einsum("ngto,ngti->goi", total, x).flatten()
        return torch.cat([weight, total.sum((0, 2)).flatten()]) if self.bias else weight

    def gram(self) -> Float[Tensor, "v v"]:
        """All inner products of the gradients: with one position, (X X^T + 1) o (G G^T)."""
        x = torch.cat(self.inputs, dim=2)
        if x.shape[1] > 1 or x.shape[2] > 1:
            return _product_in_parts(self)
        g = torch.cat([torch.cat(grads, dim=2)[:, 0, 0] for grads in self.grads])
        x = x[:, 0, 0]
        inputs = x @ x.T + (1.0 if self.bias else 0.0)
        return g @ g.T * inputs.repeat(len(self.grads), len(self.grads))

    def _within(self, which: slice) -> Iterator[tuple[int, slice]]:
        for draw in range(len(self.grads)):
            start = max(which.start, draw * self.samples) - draw * self.samples
            stop = min(which.stop, (draw + 1) * self.samples) - draw * self.samples
            if start < stop:
                yield draw, slice(start, stop)


def _product_in_parts(layer: LayerRows) -> Float[Tensor, "v v"]:
    total = layer.inputs[0].new_zeros((layer.vectors, layer.vectors))
    dense = torch.cat([layer.dense(slice(i, i + SAMPLES)) for i in range(0, layer.vectors, SAMPLES)])
    return total.addmm_(dense, dense.T)


def gradient_rows(
    model: nn.Module, layers: dict[str, nn.Module], x: Any, y: Any, loss: Loss | None, matrix: str
) -> dict[str, LayerRows]:
    """The factors of the layers that are called, or whose weight is used without a call.

    For "grad_moment" with labels y, else for the expectation over the loss's distribution.

    Raises:
        Unfactored: a layer whose gradient is not of this form (transposed convolutions), or that is not called
            as a module (projections inside nn.MultiheadAttention).
    """
    inside = set(model.modules())
    for name, module in layers.items():
        if module not in inside:
            raise Unfactored(unavailable(name, "a projection inside nn.MultiheadAttention"))
    count = batch_size(x)
    rows = {n: LayerRows(n, getattr(m, "bias", None) is not None, _width(m), count) for n, m in layers.items()}
    handles = [m.register_forward_hook(_listener(n, rows[n]), with_kwargs=True) for n, m in layers.items()]
    try:
        output = call(model, x)
        if matrix == "grad_moment":
            _backward(mean_loss(loss, output, y, count), layers, rows, None)
        else:
            _expect(model, layers, rows, logits_of(output), label_signals(model, loss, output, y, matrix))
    finally:
        for handle in handles:
            handle.remove()
    for layer in rows.values():
        layer.edges.clear()  # they hold the graph
    return {name: layer for name, layer in rows.items() if layer.inputs or not layer.whole}


def _expect(
    model: nn.Module,
    layers: dict[str, nn.Module],
    rows: dict[str, LayerRows],
    logits: Tensor,
    signals: Iterator[Tensor],
) -> None:
    """The gradients of all draws of labels that the expectation is over."""
    if samples_interact(model):
        called = [layer for layer in rows.values() if layer.inputs]
        widths = [layer.width for layer in called]
        if called and all(layer.single_position for layer in called) and few_enough(len(logits), sum(widths)):
            first = next(signals)
            _backward(logits, layers, rows, first)  # says whether the rows are whole
            alone = gradients_one_by_one(itertools.chain([first], signals))
            draws = equivalent_draws(logits, [edge for layer in called for edge in layer.edges], widths, alone)
            for layer, grads in zip(called, zip(*draws, strict=True), strict=True):
                layer.grads = [[layer.samples * g[:, None, None]] for g in grads]
            return
        if logits.numel() <= ONE_BY_ONE:
            signals = gradients_one_by_one(signals)
    for signal in signals:
        _backward(logits, layers, rows, signal)


def label_signals(model: nn.Module, loss: Loss | None, output: Any, y: Any, matrix: str) -> Iterator[Tensor]:
    """What to pull back through the logits for the expectation over the loss's distribution, each like the logits.

    Raises:
        ValueError: the loss stands for none, or the logits have another shape.
    """
    predicted = logits_of(output)
    kind = checked_distribution(loss, predicted, f"matrix={matrix!r}", tokens=matrix != "ggn")
    return weighted_gradients(kind, predicted, class_axis(kind, output, predicted, y))


def _width(module: nn.Module) -> int:
    """Outputs a group."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(module.out_channels) // int(module.groups)  # type: ignore[arg-type]


def unavailable(name: str, what: str) -> str:
    """That a layer has no exact curvature here, and what to ask for instead."""
    return (
        f"layer {name!r} is {what}, whose exact curvature is not available; "
        "pass block='<a linear or convolution layer>'"
    )


def _backward(value: Tensor, layers: dict[str, nn.Module], rows: dict[str, LayerRows], signal: Tensor | None) -> None:
    """One more draw of gradients."""
    weights: list[Any] = [module.weight for module in layers.values()]
    edges = [edge for layer in rows.values() for edge in layer.edges]
    found = torch.autograd.grad(value, [*weights, *edges], signal, retain_graph=True, allow_unused=True)
    of_outputs = iter(found[len(weights) :])
    for module, layer, weight_grad in zip(layers.values(), rows.values(), found, strict=False):
        layer.grads.append([_positions_of_grad(module, layer, x, next(of_outputs)) for x in layer.inputs])
        if len(layer.grads) == 1:
            layer.whole = _is_sum(layer, weight_grad)


def _is_sum(layer: LayerRows, weight_grad: Tensor | None) -> bool:
    """Whether a weight's gradient is the mean of its rows."""
    if not layer.inputs:
        return weight_grad is None or not weight_grad.any()
    x, g = torch.cat(layer.inputs, dim=2), torch.cat(layer.grads[0], dim=2)
    mean = torch.einsum("ngto,ngti->goi", g, x).flatten() / layer.samples
    expected = torch.zeros_like(mean) if weight_grad is None else weight_grad.flatten()
    # of the rows' size and not of their sum's, which may be nothing but rounding
    return float((mean - expected).norm()) <= SAME * float(x.norm() * g.norm()) / layer.samples


def _listener(name: str, rows: LayerRows) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], h: Any) -> None:
        if within_backward():
            return  # activation checkpointing repeats a forward pass that was read
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            raise Unfactored(unavailable(name, f"a {type(module).__name__}"))
        if (why := unreadable(module, called_on(args, kwargs), h)) is not None:
            raise Unfactored(unavailable(name, why))
        x = called_on(args, kwargs).detach()
        if x.shape[0] % rows.samples or (x.ndim > 2 and x.shape[0] != rows.samples == x.shape[1]):
            raise Unfactored(
                f"layer {name!r} reads an input {list(x.shape)}, whose rows cannot be told apart by sample: the first "
                f"dimension must be the {rows.samples} samples; pass block='<layer>' for one that does"
            )
        if (seen := padded_inside(module, x, h)) is None:
            raise Unfactored(unavailable(name, f"a {type(module).__name__}, which pads its input in a way of its own"))
        rows.inputs.append(_positions_of_input(module, seen, rows.samples))
        rows.edges.append(get_gradient_edge(shown(h)))

    return hook


def _positions_of_input(module: nn.Module, x: Tensor, samples: int) -> Float[Tensor, "n g t d"]:
    if isinstance(module, nn.Linear):
        return x.reshape(samples, 1, -1, x.shape[-1])
    assert isinstance(module, CONVOLUTIONS)
    return _by_sample(torch.cat([part.mT for part in unfolded(x, module)]), samples)


def _positions_of_grad(
    module: nn.Module, rows: LayerRows, x: Float[Tensor, "n g t d"], grad_h: Tensor | None
) -> Float[Tensor, "n g t o"]:
    """Of a call's output, times N: of the sample's own loss. Zero where no gradient reaches it."""
    if grad_h is None:
        return x.new_zeros((*x.shape[:3], rows.width))
    per_sample = grad_h.detach() * rows.samples
    if isinstance(module, nn.Linear):
        return per_sample.reshape(rows.samples, 1, -1, rows.width)
    return _by_sample(per_sample.reshape(len(grad_h), x.shape[1], -1, grad_h[0, 0].numel()).mT, rows.samples)


def _by_sample(positions: Float[Tensor, "m g t d"], samples: int) -> Float[Tensor, "n g s d"]:
    """m = n * k and s = k * t where a sample's k images (frames, windows) follow each other in the batch."""
    return positions.unflatten(0, (samples, -1)).transpose(1, 2).flatten(2, 3)
