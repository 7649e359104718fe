"""The largest eigenvalues of exact curvature matrices of networks too large for the matrices themselves.

M and F multiply by their factors (inputs and gradients at each position), H by differentiating the
gradient's product with the vector, G by J^T (H (J v)), with J v from the transpose of the transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from condzoo.probe.arguments import checked
from condzoo.probe.batches import batch_size, call
from condzoo.probe.exact import (
    MATRICES,
    exact_layers,
    in_float64_copies,
    own_parameters,
    rows_of,
)
from condzoo.probe.label_models import checked_distribution
from condzoo.probe.lanczos import TopEigenvalues, largest_eigenvalues
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import samples_interact
from condzoo.probe.losses import Loss, logits_of, mean_loss
from condzoo.probe.preserving import preserved
from condzoo.probe.sample_gradients import DenseRows

Product = Callable[[Tensor], Tensor]


def top_curvature(
    model: nn.Module,
    x: Any,
    y: Tensor | None,
    matrix: str = "fisher",
    block: str | None = None,
    *,
    k: int = 1,
    loss: Loss | None = None,
    tolerance: float = 1e-8,
    seed: int = 0,
) -> TopEigenvalues:
    """The k largest eigenvalues of F, M, H or G without forming it; arguments as in `curvature`.

    Args:
        k: how many.
        tolerance: residual over lambda_max at which it stops; the residuals come with the values.

    Returns:
        `values` in loss / parameter^2, `residuals` in the same unit, and the `products` it took.

    Raises:
        ValueError: as `curvature`, and k out of range.
    """
    checked("matrix", matrix, MATRICES)
    model, x, y, loss = in_float64_copies(model, x, y, matrix, loss)
    layers = exact_layers(model, block)
    parameters = own_parameters(layers)
    dim, device = sum(p.numel() for p in parameters), parameters[0].device
    with preserved(model, seed), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if matrix == "hessian":
            product = _hessian_product(mean_loss(loss, call(model, x), y, batch_size(x)), parameters)
        elif matrix == "ggn" and samples_interact(model):
            product = _ggn_product(_checked_logits(model, x, loss), parameters)
        else:
            rows = rows_of(model, layers, x, y, loss, matrix)
            product, dim = _rows_product(rows, batch_size(x)), sum(layer.parameters for layer in rows)
        return largest_eigenvalues(
            lambda v: product(v.to(device)).detach().cpu(), dim, k, tolerance=tolerance, seed=seed
        )


def _checked_logits(model: nn.Module, x: Any, loss: Loss | None) -> Tensor:
    logits = logits_of(call(model, x))
    checked_distribution(loss, logits, "matrix='ggn'", tokens=False)
    return logits


def _rows_product(rows: Sequence[LayerRows | DenseRows], samples: int) -> Product:
    """v -> (1/N) R^T R v, from the layers' factors."""

    def product(vector: Tensor) -> Tensor:
        parts = vector.split([layer.parameters for layer in rows])
        inner = torch.stack([layer.times(part) for layer, part in zip(rows, parts, strict=True)]).sum(0)
        return torch.cat([layer.transposed_times(inner) for layer in rows]) / samples

    return product


def _hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Product:
    gradient = _flat(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))

    def product(vector: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(gradient, parameters, vector, retain_graph=True, materialize_grads=True))

    return product


def _ggn_product(logits: Tensor, parameters: Sequence[Tensor]) -> Product:
    """J v is the derivative of J^T u with respect to u, which is linear in u."""
    dual = torch.zeros_like(logits, requires_grad=True)
    pulled = _flat(torch.autograd.grad(logits, parameters, dual, create_graph=True, materialize_grads=True))
    p = logits.detach().softmax(dim=1)

    def product(vector: Tensor) -> Tensor:
        pushed: Any = torch.autograd.grad(pulled, dual, vector, retain_graph=True)[0]
        curved = p * pushed - p * (p * pushed).sum(dim=1, keepdim=True)
        grads = torch.autograd.grad(logits, parameters, curved, retain_graph=True, materialize_grads=True)
        return _flat(grads) / logits.shape[0]

    return product


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
