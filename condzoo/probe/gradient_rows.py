"""Per-sample gradients of every layer as the factors of `LayerRows`, collected from a forward and backward passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

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
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import CONVOLUTIONS, samples_interact
from condzoo.probe.losses import Loss, logits_of, mean_loss
from condzoo.probe.patches import padded_inside, unfolded
from condzoo.probe.repetitions import within_backward
from condzoo.probe.views import shown

ELSEWHERE = "a layer whose weight is used otherwise than by its own call"
DISORDERED = "a layer whose rows are not in the order of the samples"
SAME = 1e-6  # rounding between two ways to a gradient in float64, relative


class Unfactored(ValueError):
    """A layer has no such rows; `sample_gradients` may have its gradients all the same."""


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
            value = mean_loss(loss, output, y, count)
            _backward(value, layers, rows, None)
            _check_order(model, logits_of(output), value, layers, rows)
        else:
            _expect(model, layers, rows, logits_of(output), label_signals(model, loss, output, y, matrix))
    finally:
        for handle in handles:
            handle.remove()
    for layer in rows.values():
        layer.edges.clear()  # they hold the graph
    return {name: layer for name, layer in rows.items() if layer.inputs or layer.fault}


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
            _backward(logits, layers, rows, first)  # says whether the rows are the weights' gradients
            alone = gradients_one_by_one(itertools.chain([first], signals))
            draws = equivalent_draws(logits, [edge for layer in called for edge in layer.edges], widths, alone)
            for layer, grads in zip(called, zip(*draws, strict=True), strict=True):
                layer.grads = [[layer.samples * g[:, None, None]] for g in grads]
            return
        if logits.numel() <= ONE_BY_ONE:
            signals = gradients_one_by_one(signals)
    for draw, signal in enumerate(signals):
        _backward(logits, layers, rows, signal)
        if draw == 0:
            _check_order(model, logits, (logits * signal).sum(), layers, rows)


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
        if len(layer.grads) == 1 and not _is_sum(layer, weight_grad, slice(None)):
            layer.fault = ELSEWHERE


def _check_order(
    model: nn.Module, logits: Any, value: Tensor, layers: dict[str, nn.Module], rows: dict[str, LayerRows]
) -> None:
    """See that the first and the last rows are those of the first and the last sample.

    A model that repeats or permutes its batch before a layer gives rows that add up, and are another sample's. The
    gradient of one sample alone is what the value, a function of the logits [N, ...], gives through its logits.
    """
    layer = next(iter(rows.values()))
    if samples_interact(model) or not isinstance(logits, Tensor) or len(logits) != layer.samples:
        return
    (signal,) = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
    if signal is None or not all(_agree(logits, signal, layers, rows, slice(None)).values()):
        return  # the loss sees more than the logits
    for sample in {0, layer.samples - 1}:
        alone = torch.zeros_like(signal)
        alone[sample] = signal[sample]
        for name, agrees in _agree(logits, alone, layers, rows, slice(sample, sample + 1)).items():
            if not agrees:
                rows[name].fault = DISORDERED


def _agree(
    logits: Tensor, signal: Tensor, layers: dict[str, nn.Module], rows: dict[str, LayerRows], which: slice
) -> dict[str, bool]:
    """Whether the rows of these samples make each weight's gradient of the logits times the signal."""
    named = [name for name, layer in rows.items() if not layer.fault]
    if not named:
        return {}
    weights: list[Any] = [layers[name].weight for name in named]
    found = torch.autograd.grad(logits, weights, signal, retain_graph=True, allow_unused=True)
    return {name: _is_sum(rows[name], grad, which) for name, grad in zip(named, found, strict=True)}


def _is_sum(layer: LayerRows, weight_grad: Tensor | None, which: slice) -> bool:
    """Whether a weight's gradient is the sum of these samples' rows over N, in the first draw."""
    if not layer.inputs:
        return weight_grad is None or not weight_grad.any()
    x, g = torch.cat(layer.inputs, dim=2)[which], torch.cat(layer.grads[0], dim=2)[which]
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
        alone = x.ndim < module.weight.ndim  # one row, or one image: there is no first dimension
        if alone or x.shape[0] % rows.samples or (x.ndim > 2 and x.shape[0] != rows.samples == x.shape[1]):
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
