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
classes, it is over one class for all samples at a time. M and F are decomposed on their smaller Gram side.
Shapes: N samples, K classes, P parameters, T positions of a layer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from condzoo.probe.arguments import checked
from condzoo.probe.arithmetic import float64_noise
from condzoo.probe.batches import batch_size, call, in_float64, on_device
from condzoo.probe.copying import copied
from condzoo.probe.costs import announce, cost
from condzoo.probe.gradient_rows import Unfactored, gradient_rows, unavailable
from condzoo.probe.label_models import checked_distribution, distribution_of
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import check_module, choose, samples_interact
from condzoo.probe.losses import Loss, logits_of, loss_in_float64, mean_loss, name_of
from condzoo.probe.preserving import preserved
from condzoo.probe.sample_gradients import DenseRows, sample_gradients
from condzoo.probe.second_derivatives import ggn_matrix, hessian_matrix
from condzoo.probe.spectra import Spectrum, from_blocks
from condzoo.probe.weights import own_weight
from condzoo.probe.wrappers import replica

MATRICES = ("fisher", "grad_moment", "hessian", "ggn")

LARGEST = 20_000  # side of the matrix decomposed, at most: 3.2 GB and about ten minutes


def curvature(
    model: nn.Module,
    x: Any,
    y: Tensor | None,
    matrix: str = "fisher",
    block: str | None = None,
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> Spectrum:
    """Full spectrum of an exact curvature matrix, by a float64 copy of the model in the mode it is in.

    Args:
        model: any module whose parameters of interest are in linear and convolution layers.
        x: [N, ...] inputs, or a dict or tuple of the model's arguments.
        y: [N] targets; may be None for "fisher" and "ggn", which look at their shape alone.
        matrix: "fisher" F, "grad_moment" M, "hessian" H or "ggn" G.
        block: a layer's name for its diagonal block alone, None for the whole network.
        loss: as in `measure`; F needs one that stands for a distribution, G the cross-entropy.
        seed: of dropout.

    Returns:
        P eigenvalues, in loss / parameter^2. Those that N samples cannot reach are exactly 0. A Hessian's
        may be negative.

    Raises:
        ValueError: an unknown matrix or block, a missing y, or a matrix too large to decompose.

    Warns:
        UserWarning: before it starts, with the estimated time and memory, if it will take over a minute.

    Source: arXiv:2002.10801, appendix, Figs. I-IV.
    """
    checked("matrix", matrix, MATRICES)
    model, x, y, loss = in_float64_copies(model, x, y, matrix, loss)
    layers = exact_layers(model, block)
    with preserved(model, seed), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if formed_whole(model, matrix):
            return spectrum_of_matrix(*whole_matrix(model, layers, x, y, loss, matrix))
        rows = rows_of(model, layers, x, y, loss, matrix)
    return spectrum_of_rows(rows, batch_size(x), sum(p.numel() for p in own_parameters(layers)))


def in_float64_copies(
    model: nn.Module, x: Any, y: Any, matrix: str, loss: Loss | None
) -> tuple[nn.Module, Any, Any, Loss | None]:
    """The model, a batch on its device and the loss, in float64; the model is a copy.

    Raises:
        ValueError: the matrix needs targets, or another loss.
    """
    if y is None and matrix in ("grad_moment", "hessian"):
        raise ValueError(f"matrix={matrix!r} needs targets y; 'fisher' does without")
    check_module(model)
    check_loss(matrix, loss)
    model = copied(replica(model)).double()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = on_device(in_float64((x, y)), device)
    return model, *batch, loss_in_float64(loss)


def own_parameters(layers: Mapping[str, nn.Module]) -> list[Tensor]:
    """Weights and biases of the layers, one that is shared once."""
    return list({id(p): p for m in layers.values() for p in m.parameters(recurse=False)}.values())


def exact_layers(model: nn.Module, block: str | None) -> dict[str, nn.Module]:
    """The layers whose parameters an exact matrix is over: one block's, or all.

    Raises:
        ValueError: an unknown block, no layer at all, a weight that is computed (no parameter holds it), or layers
            on several devices.
    """
    layers, _ = choose(model, None if block is None else [block])
    if not layers:
        raise ValueError("the network has no linear or convolution layer: exact curvature is over their parameters")
    for name, module in layers.items():
        if own_weight(module) is None:
            raise ValueError(unavailable(name, "a layer whose weight is computed (by a parametrization or a hook)"))
    devices = dict.fromkeys(str(p.device) for p in own_parameters(layers))
    if len(devices) > 1:
        raise ValueError(
            f"the model is split over {', '.join(devices)}; exact curvature takes layers that are on one device "
            "(condzoo.measure takes all)"
        )
    return layers


def rows_of(
    model: nn.Module, layers: Mapping[str, nn.Module], x: Any, y: Any, loss: Loss | None, matrix: str
) -> list[LayerRows] | list[DenseRows]:
    """Every sample's gradients: by factors, a layer an entry, or where one has none as they are.

    Raises:
        ValueError: no layer is called, or one has no factors and under batch statistics no gradients either.
    """
    try:
        return called_rows(gradient_rows(model, dict(layers), x, y, loss, matrix))
    except Unfactored:
        found = None if samples_interact(model) else sample_gradients(model, own_parameters(layers), x, y, loss, matrix)
        if found is None:
            raise
        return [found]


def called_rows(rows: dict[str, LayerRows]) -> list[LayerRows]:
    """The factors, of at least one layer.

    Raises:
        ValueError: none was called.
        Unfactored: one's weight is used elsewhere, too, or its rows are not in the samples' order.
    """
    for name, layer in rows.items():
        if layer.fault:
            raise Unfactored(unavailable(name, layer.fault))
    if not rows:
        raise ValueError("the forward pass calls none of the layers asked for: there is no gradient")
    return list(rows.values())


def spectrum_of_rows(rows: Sequence[LayerRows | DenseRows], samples: int, parameters: int) -> Spectrum:
    """The spectrum of (1/N) R^T R, R: [N * K, P], without forming R where N * K is the smaller side.

    `parameters` are those of the rows, and of layers that the forward pass does not call: eigenvalues of 0.
    """
    vectors, reached = rows[0].vectors, sum(layer.parameters for layer in rows)
    side = min(vectors, reached)
    _check_size(side)
    announce(cost(side, _operations(rows, samples, reached)), "exact curvature")
    small = torch.zeros((side, side), dtype=torch.float64, device=rows[0].device)
    factored = [layer for layer in rows if isinstance(layer, LayerRows) and layer.single_position]
    if vectors <= reached:
        for layer in rows:
            small += layer.gram()
    elif len(factored) == len(rows):
        small = _from_factors(factored, samples)
    else:
        for start in range(0, vectors, 512):
            part = torch.cat([layer.dense(slice(start, start + 512)) for layer in rows], dim=1)
            small.addmm_(part.T, part)
    values = torch.linalg.eigvalsh(small / samples).cpu()
    padded = torch.cat([values, values.new_zeros(parameters - side)])
    floor = float64_noise(side, max(0.0, float(values.max())))
    return from_blocks(padded[None], floor, vectors, arithmetic="exact, float64")


def _operations(rows: Sequence[LayerRows | DenseRows], samples: int, parameters: int) -> float:
    """Floating-point operations of the products in `spectrum_of_rows`."""
    vectors = rows[0].vectors
    if vectors > parameters:
        formed = samples if all(layer.single_position for layer in rows) else 2 * vectors
        return float(formed) * parameters**2
    widths = [
        layer.inputs[0].shape[3] + layer.grads[0][0].shape[3]
        if isinstance(layer, LayerRows) and layer.single_position
        else layer.parameters
        for layer in rows
    ]
    return 2.0 * vectors**2 * sum(widths)


def _from_factors(rows: list[LayerRows], samples: int) -> Tensor:
    """R^T R of layers with one position a sample, block by block, summed over the label draws first.

    Block (k, m) is sum_n G_n (x) x_n x_n^T with G_n = sum_draws g_k g_m^T, one product of [o o', N] and
    [N, i i']: a factor K less than by the rows. A bias is a last input of 1.
    """
    inputs, grads = [], []
    for layer in rows:
        x = layer.inputs[0][:, 0, 0]
        inputs.append(torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if layer.bias else x)
        grads.append(torch.stack([calls[0][:, 0, 0] for calls in layer.grads], dim=1))  # [n, draws, o]
    blocks: dict[tuple[int, int], Tensor] = {}
    for k, m in itertools.combinations_with_replacement(range(len(rows)), 2):
        summed = (grads[k].mT @ grads[m]).reshape(samples, -1)  # [n, o * o']
        outer = (inputs[k][:, :, None] * inputs[m][:, None]).reshape(samples, -1)  # [n, i * i']
        shape = (grads[k].shape[2], grads[m].shape[2], inputs[k].shape[1], inputs[m].shape[1])
        block = (summed.T @ outer).reshape(shape).permute(0, 2, 1, 3)
        blocks[k, m] = block.reshape(shape[0] * shape[2], shape[1] * shape[3])
        blocks[m, k] = blocks[k, m].T
    return torch.cat([torch.cat([blocks[k, m] for m in range(len(rows))], dim=1) for k in range(len(rows))])


def formed_whole(model: nn.Module, matrix: str) -> bool:
    """Whether the matrix is no sum over samples' gradients of their own, and is formed by differentiating the batch."""
    return matrix == "hessian" or (matrix == "ggn" and samples_interact(model))


def whole_matrix(
    model: nn.Module, layers: Mapping[str, nn.Module], x: Any, y: Any, loss: Loss | None, matrix: str
) -> tuple[Tensor, int | None]:
    """H or G [P, P] of the batch as one function, and how many vectors G is made of (None: H is of none).

    Rows and columns are in the order of `own_parameters`.
    """
    parameters = own_parameters(layers)
    side = sum(p.numel() for p in parameters)
    _check_size(side)
    if matrix == "hessian":
        value = mean_loss(loss, call(model, x), y, batch_size(x))
        announce(cost(side, 0.0, 3 * side * _seconds_of_backward(value, parameters)), "exact Hessian")
        return hessian_matrix(value, parameters), None
    logits = logits_of(call(model, x))
    checked_distribution(loss, logits, "matrix='ggn'", tokens=False)
    vectors = logits.numel()
    passes = vectors * _seconds_of_backward(logits.sum(), parameters)
    announce(cost(side, 2.0 * vectors * side**2, passes), "exact generalized Gauss-Newton matrix")
    return ggn_matrix(logits, parameters), vectors


def spectrum_of_matrix(matrix: Tensor, vectors: int | None) -> Spectrum:
    """Of H or G, or one's diagonal block; `vectors` as of `whole_matrix`."""
    values = torch.linalg.eigvalsh(matrix).cpu()
    top = values.abs().max() if vectors is None else values.max().clamp_min(0)
    floor = float64_noise(values.numel(), float(top))
    return from_blocks(values[None], floor, vectors, arithmetic="exact, float64", signed=vectors is None)


def check_loss(matrix: str, loss: Loss | None) -> None:
    """G is the cross-entropy's: of its logits' Hessian diag(p) - p p^T, which class weights would change.

    Raises:
        ValueError: matrix="ggn" with another loss.
    """
    if matrix == "ggn" and (distribution_of(loss) != "softmax" or getattr(loss, "weight", None) is not None):
        raise ValueError(
            f"matrix='ggn' needs the cross-entropy loss without class weights, got {name_of(loss)}; "
            "'fisher' takes more losses, 'hessian' and 'grad_moment' any"
        )


def _seconds_of_backward(value: Tensor, parameters: Sequence[Tensor]) -> float:
    began = time.perf_counter()
    torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return time.perf_counter() - began


def _check_size(side: int) -> None:
    if side > LARGEST:
        raise ValueError(
            f"the matrix to decompose has side {side:,}, at most {LARGEST:,} is possible; pass fewer samples, "
            "or block='<layer>' for one layer's block; condzoo.probe.top_curvature has the largest eigenvalues alone"
        )
