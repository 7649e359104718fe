"""Exact curvature matrices of a network, or of one layer's block, and their full spectra in float64.

    M = (1/N) sum_n g_n g_n^T                 g_n: sample n's gradient, label from the data
    F = (1/N) sum_n E_{y ~ p(y|x_n)} g g^T    labels from the model's softmax
    G = (1/N) sum_n J_n^T H_n J_n             J_n: Jacobian of the logits, H_n: of the loss in them
    H = d^2 L / dw^2                          L: the batch-mean loss

over the weights and biases of all linear and convolution layers. Fused attention runs by its mathematical definition,
since the fused kernels have no second derivative. With BatchNorm in train mode a sample's
gradient is defined layer by layer as g_i x_i^T, concatenated (arXiv:2002.10801, appendix); H and G are
those of the batch as one function. There g_i depends on the labels of all samples, and F's expectation is over
independent ones (label_draws.py); only where layers have many positions and a batch more than 512 labels times
classes, a class is a pass with a random (seeded) sign a sample, which is right in the mean over seeds. M and F are
decomposed on their smaller Gram side.
Shapes: N samples, K classes, P parameters, T positions of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from condzoo.probe.arguments import checked, whole_seed
from condzoo.probe.arithmetic import float64_noise
from condzoo.probe.attention import has_computed_bias, split_biases
from condzoo.probe.batches import batch_size, call, in_float64, on_device
from condzoo.probe.copying import copy_in_float64
from condzoo.probe.costs import announce, check_side, cost, now
from condzoo.probe.finiteness import checked_finite
from condzoo.probe.function_calls import BatchStatistics
from condzoo.probe.gradient_rows import Unfactored, gradient_rows, refuse_faults, unavailable
from condzoo.probe.hooks import output_sizes
from condzoo.probe.label_models import check_softmax, checked_distribution, distribution_of
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import INTERACTING, check_module, choose, samples_interact
from condzoo.probe.loss_copies import loss_beside, wide
from condzoo.probe.losses import REDUCTIONS, Loss, differentiable, logits_of, mean_loss, name_of, own_loss_of
from condzoo.probe.preserving import preserved
from condzoo.probe.row_spectra import eigenvalues, spectrum_of_rows
from condzoo.probe.sample_gradients import DenseRows, sample_gradients
from condzoo.probe.second_derivatives import ggn_matrix, hessian_matrix, rows_at_once
from condzoo.probe.spectra import Spectrum, from_blocks
from condzoo.probe.weights import own_weight
from condzoo.probe.wrappers import replica

MATRICES = ("fisher", "grad_moment", "hessian", "ggn")


def curvature(
    model: nn.Module,
    x: Any,
    y: Tensor | None,
    matrix: str = "fisher",
    block: str | None = None,
    *,
    loss: Loss | None = None,
    seed: SupportsIndex = 0,
    reduction: str | None = None,
) -> Spectrum:
    """Full spectrum of an exact curvature matrix, by a float64 copy of the model in the mode it is in.

    Args:
        model: any module whose parameters of interest are in linear and convolution layers.
        x: [N, ...] inputs, or a dict or tuple of the model's arguments.
        y: [N] targets; may be None for "fisher" and "ggn", which look at their shape alone.
        matrix: "fisher" F, "grad_moment" M, "hessian" H or "ggn" G.
        block: a layer's name for its diagonal block alone, None for the whole network.
        loss: as in `measure`; F needs one that stands for a distribution, G the cross-entropy. It sees the float64
            copy: one that uses the model itself is a module that holds it; a function that does is an error.
        seed: of dropout, and of F's random signs (above).
        reduction: as in `measure`, for M and H.

    Returns:
        P eigenvalues, in loss / parameter^2. Those that N samples cannot reach are exactly 0. A Hessian's
        may be negative.

    Raises:
        ValueError: an unknown matrix or block, a missing y, a function as loss that uses the model itself, or a matrix
            too large to decompose.

    Warns:
        UserWarning: before it starts, with the estimated time and memory, if it will take over a minute.

    Source: arXiv:2002.10801, appendix, Figs. I-IV.
    """
    seed = whole_seed(seed)
    checked("matrix", matrix, MATRICES)
    model, x, y, loss = in_float64_copies(model, x, y, matrix, loss, reduction)
    layers = exact_layers(model, block)
    with preserved(model, seed), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if formed_whole(model, matrix):
            return spectrum_of_matrix(*whole_matrix(model, layers, x, y, loss, matrix, reduction))
        rows = rows_of(model, layers, x, y, loss, matrix, seed, reduction=reduction)
    return spectrum_of_rows(rows, batch_size(x), sum(p.numel() for p in own_parameters(layers)))


def in_float64_copies(
    model: nn.Module, x: Any, y: Any, matrix: str, loss: Loss | None, reduction: str | None
) -> tuple[nn.Module, Any, Any, Loss | None]:
    """The model, a batch on its device and the loss, in float64; the model is a copy, with each projection's own bias.

    Raises:
        ValueError: the matrix needs targets, or another loss, the batch is empty, or there is no such reduction.
    """
    if reduction is not None:
        checked("reduction", reduction, REDUCTIONS)
    if y is None and matrix in ("grad_moment", "hessian"):
        raise ValueError(f"matrix={matrix!r} needs targets y; 'fisher' does without")
    check_module(model)
    check_loss(matrix, loss)
    if not batch_size(x):
        raise ValueError("the batch holds no sample: its leading dimension is 0")
    with torch.inference_mode(False):  # what is copied inside has no gradients, or wrong ones
        memo: dict[int, Any] = {}
        original, model = replica(model), copy_in_float64(replica(model), memo)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batch = on_device(in_float64((x, y)), device)
        loss = loss_beside(loss, original, memo, wide)
        split_biases(model)
        if matrix != "hessian" and not samples_interact(model) and _has_batch_statistics(model, batch[0]):
            INTERACTING.add(model)
        return model, *batch, loss


def _has_batch_statistics(model: nn.Module, x: Any) -> bool:
    """Whether a forward pass calls F.batch_norm on statistics of the batch."""
    if len({p.device for p in model.parameters()}) > 1:
        return False  # split over devices, which `exact_layers` refuses
    with preserved(model, 0), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), BatchStatistics() as noted:
        call(model, x)
    return noted.seen


def own_parameters(layers: Mapping[str, nn.Module]) -> list[Tensor]:
    """Weights and biases of the layers, one that is shared once."""
    return list({id(p): p for m in layers.values() for p in m.parameters(recurse=False)}.values())


def exact_layers(model: nn.Module, block: str | None) -> dict[str, nn.Module]:
    """The layers whose parameters an exact matrix is over: one block's, or all.

    Raises:
        ValueError: an unknown block, no layer at all, a weight or bias that is computed (no parameter holds it), or
            layers on several devices.
    """
    layers, _ = choose(model, None if block is None else [block])
    if not layers:
        raise ValueError("the network has no linear or convolution layer: exact curvature is over their parameters")
    for name, module in layers.items():
        if what := computed_parameter(module):
            raise ValueError(unavailable(name, f"a layer whose {what} is computed (by a parametrization or a hook)"))
    devices = dict.fromkeys(str(p.device) for p in own_parameters(layers))
    if len(devices) > 1:
        raise ValueError(
            f"the model is split over {', '.join(devices)}; exact curvature takes layers that are on one device "
            "(condzoo.measure takes all)"
        )
    return layers


def computed_parameter(layer: nn.Module) -> str:
    """Which of "weight" and "bias" no parameter of the layer's own holds; empty where one holds each."""
    return "weight" if own_weight(layer) is None else "bias" if has_computed_bias(layer) else ""


def rows_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    x: Any,
    y: Any,
    loss: Loss | None,
    matrix: str,
    seed: int,
    *,
    reduction: str | None,
    decomposed: bool = True,
) -> list[LayerRows] | list[DenseRows]:
    """Every sample's gradients: by factors, a layer an entry, or where one has none as they are.

    `decomposed`: their matrix is to be; `seed` is of F's random signs.

    Raises:
        ValueError: no layer is called, or one has no factors and under batch statistics no gradients either.
    """
    try:
        return called_rows(
            gradient_rows(model, dict(layers), x, y, loss, matrix, seed, reduction=reduction, decomposed=decomposed)
        )
    except Unfactored:
        if samples_interact(model):
            raise
        found = sample_gradients(model, own_parameters(layers), x, y, loss, matrix, reduction)
        if found is None:
            raise
        return [found]


def called_rows(rows: dict[str, LayerRows]) -> list[LayerRows]:
    """The factors, of at least one layer.

    Raises:
        ValueError: none was called.
        Unfactored: one's weight is used elsewhere, too, or its rows are not in the samples' order.
    """
    refuse_faults(rows)
    if not rows:
        raise ValueError("the forward pass calls none of the layers asked for: there is no gradient")
    return list(rows.values())


def formed_whole(model: nn.Module, matrix: str) -> bool:
    """Whether the matrix is no sum over samples' gradients of their own, and is formed by differentiating the batch."""
    return matrix == "hessian" or (matrix == "ggn" and samples_interact(model))


def whole_matrix(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    x: Any,
    y: Any,
    loss: Loss | None,
    matrix: str,
    reduction: str | None,
) -> tuple[Tensor, int | None]:
    """H or G [P, P] of the batch as one function, and how many vectors G is made of (None: H is of none).

    Rows and columns are in the order of `own_parameters`.
    """
    parameters = own_parameters(layers)
    side = sum(p.numel() for p in parameters)
    check_side(side)
    with output_sizes(m for m in model.modules() if not any(True for _ in m.children())) as sizes:
        output = call(model, x)
    logits = checked_finite(logits_of(output))
    rows = rows_at_once(sum(sizes))
    held, device = rows * sum(sizes), parameters[0].device
    if matrix == "hessian":
        value = differentiable(checked_finite(mean_loss(loss, output, y, batch_size(x), reduction), "the loss"))
        announce(cost(side, 0.0, 3 * side * _seconds_of_backward(value, parameters), held, device), "exact Hessian")
        return hessian_matrix(value, parameters, rows), None
    checked_distribution(loss, logits, "matrix='ggn'", tokens=False)
    check_softmax(own_loss_of(output) if loss is None else None, logits, 1, "matrix='ggn'")
    differentiable(logits)
    vectors = logits.numel()
    passes = vectors * _seconds_of_backward(logits.sum(), parameters)
    announce(cost(side, 2.0 * vectors * side**2, passes, held, device), "exact generalized Gauss-Newton matrix")
    return ggn_matrix(logits, parameters, rows), vectors


def spectrum_of_matrix(matrix: Tensor, vectors: int | None) -> Spectrum:
    """Of H or G, or one's diagonal block; `vectors` as of `whole_matrix`."""
    values = eigenvalues(matrix)
    top = values.abs().max() if vectors is None else values.max().clamp_min(0)
    floor = float64_noise(values.numel(), float(top))
    return from_blocks(values[None], floor, vectors, arithmetic="exact, float64", signed=vectors is None)


def check_loss(matrix: str, loss: Loss | None) -> None:
    """G is the cross-entropy's: of its logits' Hessian diag(p) - p p^T, which class weights would change.

    Raises:
        ValueError: matrix="ggn" with another loss, of a class that computes it in a way of its own, or with weights.
    """
    if matrix != "ggn":
        return
    inner: Any = loss
    weighted = False
    while isinstance(inner, partial):
        inner, weighted = inner.func, weighted or inner.keywords.get("weight") is not None
    own_forward = isinstance(inner, nn.Module) and type(inner).forward is not nn.CrossEntropyLoss.forward
    weighted = weighted or getattr(inner, "weight", None) is not None
    if distribution_of(inner) != "softmax" or own_forward or weighted:
        raise ValueError(
            f"matrix='ggn' needs the cross-entropy loss of torch without class weights, got {name_of(loss)}; "
            "'fisher' takes more losses, 'hessian' and 'grad_moment' any"
        )


def _seconds_of_backward(value: Tensor, parameters: Sequence[Tensor]) -> float:
    began = now(value.device)
    torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return now(value.device) - began
