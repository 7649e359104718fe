"""The largest eigenvalues of a symmetric matrix that is known only by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

    From one start Lanczos sees one eigenvector of a repeated eigenvalue. For k > 1 it starts again, orthogonally to
    what was found, until that shows nothing larger.

    Args:
        product: v [dim] to A v [dim], float64.
        dim: side of the symmetric matrix A.
        k: how many eigenvalues.
        tolerance: stops where every residual is under tolerance * lambda_max.
        most: products at most, as soon as there are k values; the residuals then say how far it came.

    Raises:
        ValueError: k is not in 1..dim.
    """
    if not 1 <= k <= dim:
        raise ValueError(f"k must be from 1 to the matrix's side {dim}, got {k}")
    generator = torch.Generator().manual_seed(seed)
    none = torch.zeros((0, dim), dtype=torch.float64, device="cpu")
    products, values, residuals, vectors = _from_one_start(product, none, k, 0.0, tolerance, most, generator)
    while len(values) < k or (k > 1 and products < most and len(values) < dim):
        wanted, scale = max(1, k - len(values)), float(values.abs().max())
        steps, new, errors, directions = _from_one_start(product, vectors, wanted, scale, tolerance, most, generator)
        products += steps
        if len(values) >= k and float(new[0]) <= float(values[k - 1]) + tolerance * scale:
            break
        values, order = torch.cat([values, new]).sort(descending=True)
        residuals, vectors = torch.cat([residuals, errors])[order], torch.cat([vectors, directions])[order]
    return TopEigenvalues(values[:k], residuals[:k], products)


def _from_one_start(
    product: Callable[[Tensor], Tensor],
    known: Float[Tensor, "m d"],
    k: int,
    least_scale: float,
    tolerance: float,
    most: int,
    generator: torch.Generator,
) -> tuple[int, Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n d"]]:
    """Products, and up to k values, residuals and vectors of A on what is orthogonal to the known ones.

    `least_scale` is lambda_max as far as it is known: what is left may be round-off beside it.
    """
    dim = known.shape[1]
    vector = _orthogonal(torch.randn(dim, generator=generator, dtype=torch.float64, device="cpu"), known)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        image = _orthogonal(image, (*known, *basis))
        beside.append(float(image.norm()))
        steps = len(diagonal)
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
        for i, value in enumerate(beside[:-1]):
            small[i, i + 1] = small[i + 1, i] = value
        values, vectors = torch.linalg.eigh(small)
        residuals = (beside[-1] * vectors[-1].abs()).flip(0)[:k]
        values = values.flip(0)[:k]
        scale = max(least_scale, float(values.abs().max()))
        exhausted = steps >= min(dim - len(known), most) or beside[-1] <= 1e-14 * scale
        if exhausted or (steps >= k and bool((residuals <= tolerance * scale).all())):
            found = basis[0].new_zeros((len(values), dim))
            for direction, weights in zip(basis, vectors.flip(1)[:, :k], strict=True):
                found.addr_(weights, direction)
            return steps, values, residuals, found
        basis.append(image / beside[-1])


def _orthogonal(vector: Float[Tensor, " d"], span: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """The vector less its part in an orthonormal span; once leaves round-off of the first subtraction.

    One after the other: of millions of parameters a second copy of all directions is gigabytes.
    """
    vector, span = vector.clone(), list(span)
    for _ in range(2):
        for direction in span:
            vector.sub_(direction, alpha=float(direction @ vector))
    return vector
