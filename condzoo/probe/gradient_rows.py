"""Per-sample gradients of every layer as the factors of `LayerRows`, collected from a forward and backward passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from condzoo.probe.batches import batch_size, call
from condzoo.probe.costs import A_CLASS, BATCH_STATISTICS, announce_passes, check_side, now
from condzoo.probe.finiteness import checked_finite, nonfinite
from condzoo.probe.label_draws import equivalent_draws, few_enough
from condzoo.probe.label_models import (
    ONE_BY_ONE,
    SOFTMAX,
    check_softmax,
    checked_distribution,
    class_axis,
    gradients_one_by_one,
    weighted_gradients,
    with_random_signs,
)
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import CHANNELS_FIRST, samples_interact
from condzoo.probe.losses import Loss, differentiable, logits_of, mean_loss, own_loss_of
from condzoo.probe.row_order import disordered
from condzoo.probe.row_reading import by_sample, read

ELSEWHERE = "a layer whose weight or bias is used otherwise than by its own call"
DISORDERED = "a layer whose rows are not in the order of the samples"
NOT_FINITE = "a layer whose input or output gradient holds NaN or Inf"
SAME = 1e-6  # rounding between two ways to a gradient in float64, relative


class Unfactored(ValueError):
    """A layer has no such rows; `sample_gradients` may have its gradients all the same."""


def gradient_rows(
    model: nn.Module,
    layers: dict[str, nn.Module],
    x: Any,
    y: Any,
    loss: Loss | None,
    matrix: str,
    seed: int,
    *,
    reduction: str | None = None,
    each: bool = False,
    decomposed: bool = True,
) -> dict[str, LayerRows]:
    """The factors of the layers that are called, or whose weight or bias is used without a call.

    For "grad_moment" with labels y, else for the expectation over the loss's distribution; `seed` is of its signs.

    Args:
        reduction: of the loss, for "grad_moment"; None: what the loss says itself.
        each: take the layers one by one, each with its `fault`; else they are parts of one matrix, which needs all.
        decomposed: that matrix is to be decomposed: say before the backward passes if it is too large.

    Raises:
        Unfactored: a layer whose gradient is not of this form (transposed convolutions), or that is not called
            as a module (projections inside nn.MultiheadAttention).
        ValueError: the network's output or the loss is not finite, or no parameter has a part in it.
    """
    inside = set(model.modules())
    for name, module in layers.items():
        if module not in inside:
            raise Unfactored(unavailable(name, "a projection inside nn.MultiheadAttention"))
    count = batch_size(x)
    rows = {n: LayerRows(n, m._parameters.get("bias") is not None, _width(m), count) for n, m in layers.items()}
    handles = [m.register_forward_hook(partial(read, rows[n]), with_kwargs=True) for n, m in layers.items()]
    try:
        output = call(model, x)
        if not each:
            refuse_faults(rows)
        logits = checked_finite(logits_of(output))
        if matrix == "grad_moment":
            value = differentiable(checked_finite(mean_loss(loss, output, y, count, reduction), "the loss"))
            _backward(value, layers, rows, None)
            ordered = _check_order(model, logits, value, layers, rows)
        else:
            signals = label_signals(loss, output, y, matrix, count)
            differentiable(logits)
            ordered = _expect(model, layers, rows, logits, signals, seed, decomposed=decomposed and not each)
    finally:
        for handle in handles:
            handle.remove()
    for layer in rows.values():
        layer.edges.clear()  # they hold the graph
    if not ordered:
        sound = {name: layers[name] for name, layer in rows.items() if not layer.fault}
        for name in disordered(model, sound, x):
            rows[name].fault = DISORDERED
    return {name: layer for name, layer in rows.items() if layer.inputs or layer.fault}


def _expect(
    model: nn.Module,
    layers: dict[str, nn.Module],
    rows: dict[str, LayerRows],
    logits: Tensor,
    signals: Iterator[Tensor],
    seed: int,
    *,
    decomposed: bool,
) -> bool:
    """The gradients of all draws of labels that the expectation is over; whether `_check_order` could look at them."""
    called = [layer for layer in rows.values() if layer.inputs]
    widths, parameters = [layer.width for layer in called], sum(layer.parameters for layer in called)
    draws, each = logits.numel() // len(logits), A_CLASS
    if samples_interact(model):
        if called and all(layer.single_position for layer in called) and few_enough(len(logits), sum(widths)):
            if decomposed:
                check_side(min(len(logits) * min(logits.numel(), sum(widths)), parameters))
            first = next(signals)
            _backward(logits, layers, rows, first)  # says whether the rows are the weights' gradients
            alone = gradients_one_by_one(itertools.chain([first], signals))
            same = equivalent_draws(logits, [edge for layer in called for edge in layer.edges], widths, alone)
            for layer, grads in zip(called, zip(*same, strict=True), strict=True):
                layer.grads = [[layer.samples * g[:, None, None]] for g in grads]
            return False
        if logits.numel() <= ONE_BY_ONE:
            signals, draws, each = gradients_one_by_one(signals), logits.numel(), BATCH_STATISTICS
        else:
            signals = with_random_signs(signals, torch.Generator().manual_seed(seed))
            for layer in called:
                layer.random_signs = True
    if decomposed:
        check_side(min(draws * len(logits), parameters))
    began, ordered = now(logits.device), False
    for draw, signal in enumerate(signals):
        _backward(logits, layers, rows, signal)
        if draw == 0:
            held = sum(x.numel() + draws * g.numel() for r in called for x, g in zip(r.inputs, r.grads[0], strict=True))
            announce_passes((now(logits.device) - began) * draws, draws, held, each)
            ordered = _check_order(model, logits, (logits * signal).sum(), layers, rows)
    return ordered


def label_signals(loss: Loss | None, output: Any, y: Any, matrix: str, samples: int) -> Iterator[Tensor]:
    """What to pull back through the logits for the expectation over the loss's distribution, each like the logits.

    Raises:
        ValueError: the loss stands for none, is the model's own and no cross-entropy, or the logits have another shape.
    """
    predicted, asked = logits_of(output), f"matrix={matrix!r}"
    kind = checked_distribution(loss, predicted, asked, tokens=matrix != "ggn", samples=samples)
    axis = class_axis(kind, output, predicted, y)
    if kind in SOFTMAX:
        check_softmax(own_loss_of(output) if loss is None else None, predicted, axis, asked)
    return weighted_gradients(kind, predicted, axis)


def _width(module: nn.Module) -> int:
    """Outputs a group."""
    if not isinstance(module, CHANNELS_FIRST):
        return int(module.out_features if isinstance(module, nn.Linear) else module.nf)  # type: ignore[arg-type]
    return int(module.out_channels) // int(module.groups)  # type: ignore[arg-type]


def refuse_faults(rows: dict[str, LayerRows]) -> None:
    """Raise where a layer's gradients are not of its rows.

    Raises:
        Unfactored: they are of another form.
        ValueError: they are not finite.
    """
    for name, layer in rows.items():
        if layer.fault == NOT_FINITE:
            raise ValueError(nonfinite(f"the input or the output gradient of layer {name!r}"))
        if layer.fault:
            raise Unfactored(unavailable(name, layer.fault))


def unavailable(name: str, what: str) -> str:
    """That a layer has no exact curvature here, and what to ask for instead."""
    return (
        f"layer {name!r} is {what}, whose exact curvature is not available; "
        "pass block='<a linear or convolution layer>'"
    )


def _backward(value: Tensor, layers: dict[str, nn.Module], rows: dict[str, LayerRows], signal: Tensor | None) -> None:
    """One more draw of gradients."""
    own = [_parameters(module, rows[name]) for name, module in layers.items()]
    wanted = [*itertools.chain(*own), *(edge for layer in rows.values() for edge in layer.edges)]
    found = iter(torch.autograd.grad(value, wanted, signal, retain_graph=True, allow_unused=True))
    own_grads = [list(itertools.islice(found, len(parameters))) for parameters in own]
    for module, layer, grads in zip(layers.values(), rows.values(), own_grads, strict=True):
        layer.grads.append([_positions_of_grad(module, layer, x, next(found)) for x in layer.inputs])
        if len(layer.grads) > 1 or layer.fault:
            continue
        if not all(bool(torch.isfinite(part).all()) for part in (*layer.inputs, *layer.grads[0])):
            layer.fault = NOT_FINITE
        elif not _are_sums(layer, grads):
            layer.fault = ELSEWHERE


def _parameters(module: nn.Module, layer: LayerRows) -> list[Any]:
    return [module.weight, module.bias] if layer.bias else [module.weight]


def _check_order(
    model: nn.Module, logits: Any, value: Tensor, layers: dict[str, nn.Module], rows: dict[str, LayerRows]
) -> bool:
    """See that each sample's rows are its own; False where this cannot show it.

    A model that repeats or permutes its batch before a layer gives rows that add up, and are another sample's. They no
    longer do with a random factor a sample. Gradients of the samples, each times its factor, are what the value, a
    function of the logits [N, ...], gives through them.
    """
    layer = next(iter(rows.values()))
    apart = isinstance(logits, Tensor) and logits.requires_grad and len(logits) == layer.samples
    if samples_interact(model) or not apart:
        return False
    (signal,) = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
    if signal is None or not all(_agree(logits, signal, layers, rows, signal.new_ones(len(signal))).values()):
        return False  # the loss sees more than the logits
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(len(signal), generator=generator, dtype=torch.float64, device="cpu").to(signal)
    for name, agrees in _agree(logits, signal, layers, rows, factors).items():
        if not agrees:
            rows[name].fault = DISORDERED
    return True


def _agree(
    logits: Tensor, signal: Tensor, layers: dict[str, nn.Module], rows: dict[str, LayerRows], factors: Tensor
) -> dict[str, bool]:
    """Whether the rows, each sample's times its factor, make each layer's gradients of the logits times the signal."""
    named = [name for name, layer in rows.items() if not layer.fault]
    if not named:
        return {}
    own = {name: _parameters(layers[name], rows[name]) for name in named}
    signal = signal * factors.view(-1, *[1] * (signal.ndim - 1))
    wanted = list(itertools.chain(*own.values()))
    found = iter(torch.autograd.grad(logits, wanted, signal, retain_graph=True, allow_unused=True))
    grads = {name: list(itertools.islice(found, len(parameters))) for name, parameters in own.items()}
    return {name: _are_sums(rows[name], grads[name], factors) for name in named}


def _are_sums(layer: LayerRows, grads: Sequence[Tensor | None], factors: Tensor | None = None) -> bool:
    """Whether a weight's and a bias's gradient are sums of the rows, each sample's times its factor, over N.

    In the first draw.
    """
    if not layer.inputs:
        return all(grad is None or not grad.any() for grad in grads)
    x, g = torch.cat(layer.inputs, dim=2), torch.cat(layer.grads[0], dim=2)
    if factors is not None:
        g = g * factors[:, None, None, None].to(g)
    sums = [torch.einsum("ngto,ngti->goi", g, x), g.sum((0, 2))]  # of a bias x is 1
    sizes = [float(x.norm()), math.sqrt(g[..., 0].numel())]
    return all(
        # of the rows' size and not of their sum's, which may be nothing but rounding
        float((total.flatten() / layer.samples - (0.0 if grad is None else grad.flatten())).norm())
        <= SAME * size * float(g.norm()) / layer.samples
        for total, size, grad in zip(sums, sizes, grads, strict=False)
    )


def _positions_of_grad(
    module: nn.Module, rows: LayerRows, x: Float[Tensor, "n g t d"], grad_h: Tensor | None
) -> Float[Tensor, "n g t o"]:
    """Of a call's output, times N: of the sample's own loss. Zero where no gradient reaches it."""
    if grad_h is None:
        return x.new_zeros((*x.shape[:3], rows.width))
    per_sample = grad_h.detach() * rows.samples
    if isinstance(module, nn.Linear):
        return per_sample.reshape(rows.samples, 1, -1, rows.width)
    return by_sample(per_sample.reshape(len(grad_h), x.shape[1], -1, grad_h[0, 0].numel()).mT, rows.samples)
