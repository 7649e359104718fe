"""How near each layer's exact curvature block is to its Kronecker approximation (arXiv:2002.10801, Proposition 1).

A sample's gradient of a layer is sum_t g_t x_t^T over its T positions (T = 1 for a linear layer on [n, d]; a bias
is a last input of 1). The approximation takes x and g as independent and positions as uncorrelated:

    E[vec(g x^T) vec(g x^T)^T]  ~  (T Sigma_x) (x) Sigma_grad_h

Shapes: N samples, T positions, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from condzoo.probe.arguments import checked, whole_seed
from condzoo.probe.arithmetic import float64_noise, gram_float64
from condzoo.probe.batches import batch_size
from condzoo.probe.costs import too_large
from condzoo.probe.eigenvalues import eigvalsh
from condzoo.probe.exact import computed_parameter, in_float64_copies
from condzoo.probe.finishing import NO_GRADIENT, NOT_CALLED
from condzoo.probe.gradient_rows import gradient_rows
from condzoo.probe.kronecker import KroneckerSpectrum
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.layers import CONVOLUTIONS, choose, kind
from condzoo.probe.losses import Loss
from condzoo.probe.preserving import preserved
from condzoo.probe.row_spectra import spectrum_of_rows
from condzoo.probe.spectra import Spectrum, from_blocks

MATRICES = ("fisher", "grad_moment")


@dataclass(frozen=True, eq=False)
class KroneckerQuality:
    """One layer's exact block beside its approximation.

    Attributes:
        kind: "Linear", "Conv2d", ...
        exact: spectrum of the layer's diagonal block of F or M.
        kronecker: spectrum of (T Sigma_x) (x) Sigma_grad_h, of as many eigenvalues.
        positions: T, over all calls of the layer.
    """

    kind: str
    exact: Spectrum
    kronecker: KroneckerSpectrum
    positions: int

    @property
    def lambda_ratio(self) -> float:
        """lambda_max of the exact block over that of the approximation; NaN where both are 0."""
        top = self.kronecker.lambda_max
        return self.exact.lambda_max / top if top else math.nan

    @property
    def relative_distance(self) -> float:
        """|a - b|_2 / |a|_2 of the sorted spectra, a exact and b the approximation's: mostly of the large ones.

        NaN where all are 0.
        """
        a, b = self.exact.eigenvalues, self.kronecker.eigenvalues
        return float((a - b).norm() / a.norm())

    @property
    def log_distance(self) -> float:
        """max_i |log10 (a_i / b_i)| over the i at which both sorted spectra are above their noise floors, else NaN."""
        known = min(self.exact.rank, self.kronecker.rank)
        ratio = self.exact.eigenvalues[:known] / self.kronecker.eigenvalues[:known]
        return float(ratio.log10().abs().max()) if known else math.nan


@dataclass(frozen=True, eq=False)
class KroneckerReport(Mapping[str, KroneckerQuality]):
    """A mapping from layer name to `KroneckerQuality`.

    Attributes:
        layers: in the order of the modules.
        skipped: layers left out, with the reason.
        matrix: "fisher" or "grad_moment".
        mode: "train" or "eval", of the model.
        samples: N.
    """

    layers: dict[str, KroneckerQuality]
    skipped: dict[str, str] = field(default_factory=dict)
    matrix: str = "fisher"
    mode: str = "train"
    samples: int = 0

    def __getitem__(self, name: str) -> KroneckerQuality:
        """One layer; a KeyError says why it was skipped."""
        if name in self.layers:
            return self.layers[name]
        raise KeyError(f"no layer {name!r}: {self.skipped.get(name, 'there are ' + ', '.join(self.layers))}")

    def __iter__(self) -> Iterator[str]:
        """Layer names."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def table(self) -> str:
        """The report as text, one line a layer."""
        head = ("layer", "kind", "T", "d", "lmax exact", "lmax Kronecker", "ratio", "L2", "log10", "ranks")
        rows = [head, *(_row(name, layer) for name, layer in self.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        cells = [[row[i].ljust(w) if i < 2 else row[i].rjust(w) for i, w in enumerate(widths)] for row in rows]
        title = f"{self.matrix}: exact blocks and their Kronecker products, {self.samples} samples, {self.mode} mode"
        legend = (
            "ratio: lambda_max exact / Kronecker; L2: |a - b| / |a| of the sorted spectra; log10: largest |log10 a/b| "
            "where both are known; ranks: eigenvalues above the noise, exact / Kronecker; T: positions a sample"
        )
        skipped = [f"skipped {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join([title, *("  ".join(row) for row in cells), *skipped, legend])


def kronecker_report(
    model: nn.Module,
    x: Any,
    y: Any = None,
    matrix: str = "fisher",
    *,
    layers: Sequence[str] | None = None,
    loss: Loss | None = None,
    seed: SupportsIndex = 0,
    reduction: str | None = None,
) -> KroneckerReport:
    """Each layer's exact block of F or M against its Kronecker approximation, from the same rows, in float64.

    Args:
        model: any module; a float64 copy in the mode it is in is used.
        x: [N, ...] inputs, or a dict or tuple of the model's arguments.
        y: targets; may be None for "fisher", which looks at their shape alone.
        matrix: "fisher" (labels from the model) or "grad_moment" (labels from the data).
        layers: names or shell patterns; None takes all linear and convolution layers.
        loss: as in `curvature`.
        seed: of dropout, and of F's random signs where `curvature` takes some.
        reduction: as in `curvature`.

    Returns:
        A `KroneckerReport`: layer name to `KroneckerQuality`; eigenvalues in loss / parameter^2. A layer whose block
        is too large to decompose is in `skipped`.

    Raises:
        ValueError: an unknown matrix or layer, or a missing y.

    Source: arXiv:2002.10801, Proposition 1; for convolutions arXiv:1602.01407.

    Convolutions count patches, as K-FAC does. With one position and labels whose gradient does not depend on x
    the two are equal; the ratio says how far that is off.
    """
    seed = whole_seed(seed)
    checked("matrix", matrix, MATRICES)
    model, x, y, loss = in_float64_copies(model, x, y, matrix, loss, reduction)
    chosen, skipped = choose(model, layers)
    inside = set(model.modules())
    blocks: dict[str, nn.Module] = {
        n: m
        for n, m in chosen.items()
        if isinstance(m, (nn.Linear, *CONVOLUTIONS)) and m in inside and not computed_parameter(m)
    }
    skipped |= {n: f"the exact block of {_what(m)} is not available" for n, m in chosen.items() if n not in blocks}
    with preserved(model, seed), torch.inference_mode(False), torch.enable_grad():
        rows = gradient_rows(model, blocks, x, y, loss, matrix, seed, reduction=reduction, each=True) if blocks else {}
    samples = batch_size(x)
    skipped |= {n: f"the exact block of {layer.fault} is not available" for n, layer in rows.items() if layer.fault}
    rows = {n: layer for n, layer in rows.items() if not layer.fault}
    reached = {n: layer for n, layer in rows.items() if any(bool(g.any()) for calls in layer.grads for g in calls)}
    skipped |= {n: why for n, layer in reached.items() if (why := _beyond(layer))}
    found = {n: _quality(blocks[n], layer, samples) for n, layer in reached.items() if n not in skipped}
    skipped |= {n: NO_GRADIENT if n in rows else NOT_CALLED for n in blocks if n not in reached and n not in skipped}
    return KroneckerReport(found, skipped, matrix, "train" if model.training else "eval", samples)


def _beyond(rows: LayerRows) -> str:
    """Why a layer's exact block cannot be decomposed; empty where it can."""
    side = min(rows.vectors, rows.parameters)
    return f"its exact block is too large to decompose (side {side:,}); pass fewer samples" if too_large(side) else ""


def _quality(module: nn.Module, rows: LayerRows, samples: int) -> KroneckerQuality:
    exact = spectrum_of_rows([rows], samples, rows.parameters)
    x = torch.cat(rows.inputs, dim=2)  # [N, g, T, d]
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=3) if rows.bias else x
    positions = x.shape[2]
    inputs = gram_float64(x.mT) / samples
    draws = [torch.cat(calls, dim=2) for calls in rows.grads]
    grads = torch.stack([gram_float64(g.mT) for g in draws]).sum(0) / (samples * positions)
    product = KroneckerSpectrum(
        _spectrum(inputs, samples * positions), _spectrum(grads, len(draws) * samples * positions)
    )
    return KroneckerQuality(kind(module), exact, product, positions)


def _spectrum(moment: Tensor, vectors: int) -> Spectrum:
    values = eigvalsh(moment)
    return from_blocks(values, float64_noise(moment.shape[-1], float(values.max())), vectors, arithmetic="float64")


def _what(module: nn.Module) -> str:
    if what := computed_parameter(module):
        return f"a layer whose {what} is computed"
    projection = isinstance(module, nn.Linear)
    return "a projection inside nn.MultiheadAttention" if projection else type(module).__name__


def _row(name: str, layer: KroneckerQuality) -> tuple[str, ...]:
    tops = f"{layer.exact.lambda_max:.3g}", f"{layer.kronecker.lambda_max:.3g}", f"{layer.lambda_ratio:.3g}"
    distances = f"{layer.relative_distance:.2g}", f"{layer.log_distance:.2g}"
    ranks = f"{layer.exact.rank}/{layer.kronecker.rank}"
    return name or "(model)", layer.kind, str(layer.positions), str(layer.exact.dim), *tops, *distances, ranks
