"""The largest eigenvalues of a symmetric matrix that is known only by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopEigenvalues:
    """The k largest eigenvalues, and how sure they are.

    Attributes:
        values: [k] float64, descending.
        residuals: [k], |A v - lambda v| for the unit vectors found: an eigenvalue lies within it.
        products: matrix-vector products that it took.
    """

    values: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    products: int


def largest_eigenvalues(
    product: Callable[[Tensor], Tensor],
    dim: int,
    k: int = 1,
    *,
    tolerance: float = 1e-8,
    most: int = 300,
    seed: int = 0,
) -> TopEigenvalues:
    """Lanczos with full reorthogonalization, from a seeded random start.

    Args:
        product: v [dim] to A v [dim], float64.
        dim: side of the symmetric matrix A.
        k: how many eigenvalues.
        tolerance: stops where every residual is under tolerance * lambda_max.
        most: products at most; the residuals then say how far it came.

    Raises:
        ValueError: k is not in 1..dim.
    """
    if not 1 <= k <= dim:
        raise ValueError(f"k must be from 1 to the matrix's side {dim}, got {k}")
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(dim, generator=generator, dtype=torch.float64)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        span = torch.stack(basis)
        for _ in range(2):  # once leaves round-off of the first subtraction
            image = image - span.T @ (span @ image)
        beside.append(float(image.norm()))
        steps = len(diagonal)
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for i, value in enumerate(beside[:-1]):
            small[i, i + 1] = small[i + 1, i] = value
        values, vectors = torch.linalg.eigh(small)
        residuals = (beside[-1] * vectors[-1].abs()).flip(0)[:k]
        values = values.flip(0)[:k]
        scale = float(values.abs().max())
        exhausted = steps >= min(dim, most) or beside[-1] <= 1e-14 * scale
        if exhausted or (steps >= k and bool((residuals <= tolerance * scale).all())):
            return TopEigenvalues(values, residuals, steps)
        basis.append(image / beside[-1])
