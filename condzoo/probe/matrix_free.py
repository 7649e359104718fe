"""The largest eigenvalues of exact curvature matrices of networks too large for the matrices themselves.

M and F multiply by their factors (inputs and gradients at each position), H by differentiating the
gradient's product with the vector, G by J^T (H (J v)), with J v from the transpose of the transpose. Where samples do
not interact, a softmax's F is G: the factors of few classes and small layers are quicker, J is for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from condzoo.probe.arguments import checked, whole_seed
from condzoo.probe.batches import batch_size, call
from condzoo.probe.exact import (
    MATRICES,
    exact_layers,
    in_float64_copies,
    own_parameters,
    rows_of,
)
from condzoo.probe.finiteness import checked_finite, nonfinite
from condzoo.probe.gradient_rows import SAME
from condzoo.probe.hooks import output_sizes
from condzoo.probe.label_models import check_softmax, checked_distribution, distribution_of
from condzoo.probe.lanczos import TopEigenvalues, largest_eigenvalues
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import samples_interact
from condzoo.probe.losses import Loss, differentiable, logits_of, mean_loss, own_loss_of
from condzoo.probe.preserving import preserved
from condzoo.probe.sample_gradients import MOST, DenseRows

Product = Callable[[Tensor], Tensor]

FEW = 1 << 27  # numbers in the output gradients of all classes together, up to which factors are kept: 1 GB
CLASSES = 64  # up to which a backward pass each, for the factors, is less than the derivatives take


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
    seed: SupportsIndex = 0,
    reduction: str | None = None,
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
    seed = whole_seed(seed)
    checked("matrix", matrix, MATRICES)
    model, x, y, loss = in_float64_copies(model, x, y, matrix, loss, reduction)
    layers = exact_layers(model, block)
    parameters = own_parameters(layers)
    side, device = sum(p.numel() for p in parameters), parameters[0].device
    if not 1 <= k <= side:
        raise ValueError(f"k must be from 1 to the matrix's side {side}, got {k}")
    dim = side  # of what has products
    with preserved(model, seed), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if matrix == "hessian":
            product: Product | None = _hessian_product(_checked_loss(model, x, y, loss, reduction), parameters)
        else:
            product = _jacobian_product(model, layers, x, loss, matrix)
        if product is None:
            with preserved(model, seed):  # dropout as in a first forward pass
                rows = rows_of(model, layers, x, y, loss, matrix, seed, reduction=reduction, decomposed=False)
            product, dim = _rows_product(rows, batch_size(x)), sum(layer.parameters for layer in rows)
        product = _on_cpu(product, device)
        return _with_zeros(largest_eigenvalues(product, dim, min(k, dim), tolerance=tolerance, seed=seed), k)


def _with_zeros(found: TopEigenvalues, k: int) -> TopEigenvalues:
    """k eigenvalues: those of layers that are not called, which have no rows, are exactly 0."""
    missing = found.values.new_zeros(k - len(found.values))
    values, order = torch.cat([found.values, missing]).sort(descending=True, stable=True)
    return TopEigenvalues(values, torch.cat([found.residuals, missing])[order], found.products)


def _on_cpu(product: Product, device: torch.device) -> Product:
    def checked(vector: Tensor) -> Tensor:
        image = product(vector.to(device)).detach().cpu()
        if not bool(torch.isfinite(image).all()):
            raise ValueError(nonfinite("the product of the network's gradients"))
        return image

    return checked


def _checked_loss(model: nn.Module, x: Any, y: Any, loss: Loss | None, reduction: str | None) -> Tensor:
    output = call(model, x)
    checked_finite(logits_of(output))
    return differentiable(checked_finite(mean_loss(loss, output, y, batch_size(x), reduction), "the loss"))


def _jacobian_product(
    model: nn.Module, layers: Mapping[str, nn.Module], x: Any, loss: Loss | None, matrix: str
) -> Product | None:
    """v -> G v without factors; None where they are wanted, or the backward pass cannot be differentiated."""
    interacting = samples_interact(model)
    if matrix == "grad_moment" or (matrix == "fisher" and (interacting or distribution_of(loss) != "softmax")):
        return None
    with output_sizes(layers.values()) as sizes:
        output = call(model, x)
    logits = checked_finite(logits_of(output))
    if matrix == "ggn":
        checked_distribution(loss, logits, "matrix='ggn'", tokens=False)
        differentiable(logits)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        check_softmax(own_loss_of(output) if loss is None else None, logits, 1, f"matrix={matrix!r}")
    parameters = own_parameters(layers)
    if interacting:
        return _ggn_product(logits, parameters)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch_size(x) or not logits.requires_grad:
        return None
    count = sum(p.numel() for p in parameters)
    classes = logits.shape[1]
    few = classes <= CLASSES and classes * sum(sizes) <= FEW and logits.numel() * count <= MOST
    if few or not _reaches(logits, parameters):
        return None
    product = _ggn_product(logits, parameters)
    return product if _is_symmetric(product, parameters[0].new_zeros(count)) else None


def _reaches(logits: Tensor, parameters: Sequence[Tensor]) -> bool:
    found = torch.autograd.grad(logits.sum(), parameters, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in found)


def _is_symmetric(product: Product, like: Tensor) -> bool:
    """Whether these are G's products: some functions of a user's have no second derivative, or one in part."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(len(like), generator=generator, dtype=torch.float64, device="cpu").to(like) for _ in range(2))
    try:
        image_a, image_b = product(a), product(b)
    except RuntimeError:
        return False
    size = a.norm() * image_b.norm() + b.norm() * image_a.norm()
    return float((a @ image_b - b @ image_a).abs()) <= SAME * float(size)


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
        if not gradient.requires_grad:  # the loss is linear in all parameters
            return torch.zeros_like(vector)
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
