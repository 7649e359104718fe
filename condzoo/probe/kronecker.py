"""The Kronecker approximation of a layer's Fisher: all products of two spectra, formed only when asked for.

F = Sigma_x (x) Sigma_grad_h (arXiv:2002.10801, Proposition 1), so its eigenvalues are a_i * b_j:
lambda_max multiplies, and so does kappa at p = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from condzoo.probe.spectra import Spectrum, Status, kept

DIRECT = 1 << 20  # products up to this many are formed and sorted: 8 MB


@dataclass(frozen=True, eq=False)
class KroneckerSpectrum:
    """Spectrum of Sigma_x (x) Sigma_grad_h, with the memory of its two factors.

    It is asked as a `Spectrum` is, but for `reachable` and `complement_condition_number`, which its factors have.
    A grouped layer's Fisher is one such product a group, and the spectrum is that of all groups.

    Attributes:
        input: spectrum of Sigma_x.
        output_grad: spectrum of Sigma_grad_h.
    """

    input: Spectrum
    output_grad: Spectrum

    @property
    def dim(self) -> int:
        """Number of eigenvalues: d_in * d_out summed over groups."""
        groups = len(self._pairs)
        return self.input.dim * self.output_grad.dim // groups

    @property
    def computed(self) -> int:
        """How many of the largest eigenvalues can be told: d_in * d_out, or 1 with `kappa=False`."""
        return self.dim if self.input.size is None and self.output_grad.size is None else 1

    @property
    def lambda_max(self) -> float:
        """lambda_max(Sigma_x) * lambda_max(Sigma_grad_h), the largest over groups."""
        return max(float(a[0] * b[0]) for a, b in self._pairs)

    @cached_property
    def eigenvalues(self) -> Float[Tensor, " n"]:
        """All products of what the factors hold, descending, those under a noise floor as they were measured."""
        return torch.cat([torch.outer(a, b).flatten() for a, b in self._pairs]).sort(descending=True).values

    @property
    def noise_floor(self) -> float:
        """Products at or under it count as zero: they may involve a factor's eigenvalue that is noise."""
        a, b = self.input, self.output_grad
        unknown_a = a.noise_floor if a.rank < a.reachable else 0.0
        unknown_b = b.noise_floor if b.rank < b.reachable else 0.0
        return max(unknown_a * b.lambda_max, unknown_b * a.lambda_max)

    @property
    def rank(self) -> int:
        """How many products of eigenvalues above their floors are above this spectrum's own."""
        return self._count(self.noise_floor)

    def condition_number(self, p: float = 1.0) -> float:
        """kappa_p of the product, without forming it where it is large; inf where not known, NaN where not computed."""
        j = kept(p, self.dim)
        if j > self.computed:
            return math.nan
        return self.lambda_max / self._largest(j) if j <= self.rank else math.inf

    def at_least(self, p: float = 1.0) -> float:
        """What kappa_p is at least: kappa_p itself where it is known, else lambda_max / noise_floor, or 1."""
        if kept(p, self.dim) <= self.rank or kept(p, self.dim) > self.computed:
            return self.condition_number(p)
        return max(1.0, self.lambda_max / self.noise_floor) if self.noise_floor > 0 else math.inf

    @property
    def null_reason(self) -> str:
        """What makes a factor's eigenvalues exactly zero, and with them products."""
        reasons = {"input": self.input.null_reason, "output_grad": self.output_grad.null_reason}
        return "; ".join(f"{side} {why}" for side, why in reasons.items() if why)

    def status(self, p: float = 1.0) -> Status:
        """As `Spectrum.status`: "ok", else why kappa_p of the product is not known."""
        if kept(p, self.dim) > self.computed:
            return "not computed"
        if kept(p, self.dim) <= self.rank:
            return "ok"
        return next((s for s in (self.input.status(), self.output_grad.status()) if s != "ok"), "bound")

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        a = self.input.eigenvalues[None] if self.input.blocks is None else self.input.blocks
        b = self.output_grad.eigenvalues[None] if self.output_grad.blocks is None else self.output_grad.blocks
        return list(zip(a, b, strict=True))

    @cached_property
    def _known(self) -> list[tuple[Tensor, Tensor]]:
        floors = self.input.noise_floor, self.output_grad.noise_floor
        return [(a[a > floors[0]], b[b > floors[1]]) for a, b in self._pairs]

    def _count(self, threshold: float) -> int:
        """How many known products exceed the threshold: one binary search a row."""
        total = 0
        for a, b in self._known:
            above = torch.searchsorted(b.flip(0), threshold / a, right=True)
            total += a.numel() * b.numel() - int(above.sum())
        return total

    def _largest(self, j: int) -> float:
        """The j-th largest product, by bisection on its logarithm where the products are many."""
        if self.dim <= DIRECT:
            known = torch.cat([torch.outer(a, b).flatten() for a, b in self._known])
            return float(known.topk(j).values[-1])
        high = math.log(self.lambda_max) + 1e-9
        low = min(float((a[-1] * b[-1]).log()) for a, b in self._known if a.numel() and b.numel()) - 1e-9
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._count(math.exp(middle)) >= j else (low, middle)
        return math.exp(high)
