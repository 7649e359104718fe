"""Spectra of second moments: eigenvalues with the noise floor under which they mean nothing.

kappa_p = lambda_max / lambda_j with lambda_j the ceil(p * d)-th largest of d eigenvalues
(arXiv:2002.10801, eq. 4). Where lambda_j is not above the noise floor, kappa_p is inf and `status`
says why: a large finite number there would measure the arithmetic, not the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from condzoo.probe.eigenvalues import eigvalsh

Status = Literal["ok", "bound", "structural null", "rank-limited", "not computed"]


def kept(p: float, dim: int) -> int:
    """j = ceil(p * dim): how many of `dim` eigenvalues kappa_p spans.

    Raises:
        ValueError: p is not in (0, 1].
    """
    if not 0 < p <= 1:
        hint = f"; for {p:g} percent write p={p / 100:g}" if 1 < p <= 100 else ""
        raise ValueError(f"p must be a fraction in (0, 1], got {p}{hint}")
    return max(1, math.ceil(p * dim - 1e-9))  # 0.7 * 10 is 7.000000000000001 in floating point


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of one second moment and what is known about them.

    Attributes:
        eigenvalues: float64, descending, [d]; for a grouped layer those of all groups together. With
            `kappa=False` only the largest, [1], or that of each group.
        noise_floor: an eigenvalue at or under it counts as zero; one above it is right to about 5 %, of float64 data 1.
        rows: vectors behind the moment (None if unknown); each group's rank cannot exceed it.
        nulls: eigenvalues that are exactly zero by structure, not by arithmetic.
        null_reason: what makes them so ("2 coordinates always 0", ...).
        arithmetic: how the moment was formed, for example "float64 products of float32 data".
        blocks: [groups, d / groups] eigenvalues group by group, None if there is one group.
        size: d, where only the largest eigenvalues were computed; None: all of them are there.
    """

    eigenvalues: Float[Tensor, " d"]
    noise_floor: float = 0.0
    rows: int | None = None
    nulls: int = 0
    null_reason: str = ""
    arithmetic: str = ""
    blocks: Float[Tensor, "g b"] | None = None
    size: int | None = None

    @property
    def dim(self) -> int:
        """d, the number of eigenvalues, computed or not."""
        return self.eigenvalues.numel() if self.size is None else self.size

    @property
    def computed(self) -> int:
        """How many of the largest eigenvalues are there: d, or 1 with `kappa=False`."""
        return self.dim if self.size is None else 1

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue; 0.0 where d is 0."""
        return float(self.eigenvalues[0]) if self.dim else 0.0

    @property
    def rank(self) -> int:
        """How many of the eigenvalues that are there are above the noise floor."""
        return int((self.eigenvalues > self.noise_floor).sum())

    @property
    def reachable(self) -> int:
        """How many eigenvalues can be nonzero: what the rows and the known nulls leave of d."""
        groups = 1 if self.blocks is None else self.blocks.shape[0]
        by_rows = self.dim if self.rows is None else min(self.dim, self.rows * groups)
        return min(by_rows, self.dim - self.nulls)

    def condition_number(self, p: float = 1.0) -> float:
        """kappa_p = lambda_max / lambda_j, j = ceil(p * d).

        Args:
            p: fraction of the spectrum kept, in (0, 1].

        Returns:
            inf where lambda_j is not above the noise floor, NaN where it was not computed; see `status`.
        """
        j = kept(p, self.dim)
        if j > self.computed:
            return math.nan
        return self.lambda_max / float(self.eigenvalues[j - 1]) if j <= self.rank else math.inf

    def at_least(self, p: float = 1.0) -> float:
        """What kappa_p is at least: kappa_p itself where it is known, else lambda_max / noise_floor, or 1."""
        if kept(p, self.dim) <= self.rank or kept(p, self.dim) > self.computed:
            return self.condition_number(p)
        return max(1.0, self.lambda_max / self.noise_floor) if self.noise_floor > 0 else math.inf

    def complement_condition_number(self, p: float = 1.0) -> float:
        """kappa_p on the complement of the known null space: of the `reachable` eigenvalues alone."""
        if self.reachable == 0:
            return math.inf
        j = kept(p, self.reachable)
        if j > self.computed:
            return math.nan
        return self.lambda_max / float(self.eigenvalues[j - 1]) if j <= self.rank else math.inf

    def status(self, p: float = 1.0) -> Status:
        """How far `condition_number(p)` can be trusted.

        Returns:
            "ok": the value is above the noise; "rank-limited": fewer rows than it spans;
            "structural null": an eigenvalue it spans is exactly zero; "bound": all that is known is
            that kappa_p is at least `at_least(p)`; "not computed": measured with `kappa=False`.
        """
        j = kept(p, self.dim)
        if j > self.computed:
            return "not computed"
        if j <= self.rank:
            return "ok"
        if j <= self.reachable:
            return "bound"
        return "structural null" if self.dim - self.nulls == self.reachable else "rank-limited"


def spectrum(moment: Float[Tensor, "*shape"] | np.ndarray, *, rows: int | None = None) -> Spectrum:
    """The spectrum of a second moment, or of eigenvalues that you already have.

    Args:
        moment: [d, d] symmetric, [g, d, d] (a block a group), or [d] eigenvalues in any order.
        rows: how many vectors the moment averages, where known.

    Returns:
        A `Spectrum`, in the moment's units; its noise floor is that of the moment's dtype.

    Raises:
        ValueError: not one of these shapes, not symmetric, or not finite.
    """
    moment = as_tensor(moment)
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("moment holds NaN or Inf; find its origin with condzoo.measure(...).skipped")
    dim = moment.shape[-1] if moment.ndim else 0
    if moment.ndim == 1 and dim:
        values, rounding = moment.double()[None], dim * _unit_roundoff(moment.dtype)
    elif moment.ndim in (2, 3) and moment.shape[-2] == dim and dim:
        if not torch.allclose(moment, moment.mT, rtol=1e-4, atol=1e-6 * float(moment.abs().max())):
            raise ValueError(f"moment [{dim}, {dim}] is not symmetric; pass X.T @ X / n, or eigenvalues")
        values = eigvalsh(moment.double()).reshape(-1, dim)
        rounding = 100 * math.sqrt(dim) * _unit_roundoff(moment.dtype)
    else:
        raise ValueError(f"moment must be [d, d], [groups, d, d] or eigenvalues [d], got shape {list(moment.shape)}")
    return from_blocks(values, rounding * max(0.0, float(values.max())), rows, arithmetic=str(moment.dtype)[6:])


def from_blocks(
    values: Float[Tensor, "g b"],
    noise_floor: float,
    rows: int | None = None,
    *,
    nulls: int = 0,
    null_reason: str = "",
    arithmetic: str = "",
    signed: bool = False,
    size: int | None = None,
) -> Spectrum:
    """A Spectrum from eigenvalues [groups, d] in any order; what round-off made negative becomes 0.

    `signed` keeps negative ones (a Hessian's), which count as not above the noise floor. `size`: d, where the
    values are but the largest of each group.
    """
    blocks = values.detach().cpu().double()
    blocks = (blocks if signed else blocks.clamp(min=0)).sort(dim=1, descending=True).values
    return Spectrum(
        eigenvalues=blocks[0] if blocks.shape[0] == 1 else blocks.flatten().sort(descending=True).values,
        noise_floor=noise_floor,
        rows=rows,
        nulls=nulls,
        null_reason=null_reason,
        arithmetic=arithmetic,
        blocks=blocks if blocks.shape[0] > 1 else None,
        size=size,
    )


def condition_number(eigenvalues: Any, p: float = 1.0) -> float:
    """kappa_p = lambda_max / lambda_j with lambda_j the ceil(p * d)-th largest of d eigenvalues.

    Args:
        eigenvalues: [d], in any order, or a `Spectrum` or the Kronecker product of two (`layer.fisher`).
        p: fraction of the spectrum kept, in (0, 1]; 1.0 is the usual condition number.

    Returns:
        kappa_p, without unit; inf where lambda_j is zero, negative or at most d * (eps / 2) * lambda_max, with
        eps of the eigenvalues' dtype.

    Raises:
        ValueError: p outside (0, 1], no eigenvalues, or not finite.
        TypeError: they are complex.

    Source: arXiv:2002.10801, eq. 4.
    """
    if hasattr(eigenvalues, "condition_number"):
        return float(eigenvalues.condition_number(p))
    values = as_tensor(eigenvalues)
    if values.ndim != 1 or not values.numel():
        raise ValueError(
            f"eigenvalues must be a non-empty vector [d], got shape {list(values.shape)}; "
            "for a matrix call condzoo.spectrum(moment).condition_number(p)"
        )
    kept(p, values.numel())
    return spectrum(values if values.is_floating_point() else values.double()).condition_number(p)


def as_tensor(values: Any) -> Tensor:
    """A tensor of numbers in any container; of numpy's, views that run backwards and read-only ones, too.

    One on Apple's GPU comes to the CPU: MPS has no float64.

    Raises:
        TypeError: they are complex.
    """
    if isinstance(values, np.ndarray):
        values = torch.as_tensor(np.array(values), device="cpu")
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(
                f"eigenvalues and moments must be real, got {str(values.dtype)[6:]}; a symmetric matrix has real ones, "
                "which torch.linalg.eigvalsh gives"
            )
        return values.cpu() if values.device.type == "mps" else values
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")  # which Python's numbers are


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 2.0**-53
