"""Largest singular values of a layer's weight and of its gradient; their ratio is weight domination.

sigma_max(dL/dW) / sigma_max(W) small means that one step hardly changes the layer
(arXiv:2002.10801, sec. 4.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

EXACT = 1024  # smaller side up to which all singular values are computed
BLOCK, ITERATIONS = 8, 24  # of the subspace iteration beyond it


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """The layer's weight if it is a plain parameter (not computed by a parametrization)."""
    return module._parameters.get("weight")


def weight_matrices(module: nn.Module, weight: Tensor) -> Float[Tensor, "g out in"]:
    """A weight, or its gradient, as one matrix a group.

    [g, d_out / g, d_in / g * kernel]; of a transposed convolution [g, d_in / g, d_out / g * kernel].
    """
    if weight.ndim == 2:
        return weight[None]
    groups = int(getattr(module, "groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def largest_singular_values(layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """sigma_max of weights, or of their gradients, by layer name, in their units.

    Exact (from the smaller Gram side, in float64, all of one size at once) up to 1,024; beyond, subspace
    iteration (`dominant`). A tensor with NaN or Inf has none and is left out.
    """
    found: dict[str, float] = {}
    grams: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        blocks = weight_matrices(layers[name], tensor.detach())
        wide = blocks if blocks.shape[1] <= blocks.shape[2] else blocks.mT
        if not bool(torch.isfinite(wide.sum(dtype=torch.float64))):
            continue
        if wide.shape[1] > EXACT:
            found[name] = dominant(wide)
        else:
            grams[wide.shape[1], wide.device].append((name, wide.double() @ wide.double().mT))
    for same_size in grams.values():
        tops = torch.linalg.eigvalsh(torch.cat([gram for _, gram in same_size]))[:, -1]
        per_layer = tops.split([gram.shape[0] for _, gram in same_size])
        for (name, _), top in zip(same_size, per_layer, strict=True):
            found[name] = float(top.max().clamp(min=0).sqrt())
    return {name: found[name] for name in tensors if name in found}


def dominant(blocks: Float[Tensor, "g m n"]) -> float:
    """sigma_max by 24 steps of subspace iteration with 8 vectors: to about 1e-6, never above it."""
    blocks = blocks if blocks.dtype == torch.float64 else blocks.float()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((blocks.shape[2], BLOCK), generator=generator, dtype=torch.float64).to(blocks)
    basis = torch.linalg.qr(start).Q.expand(blocks.shape[0], -1, -1)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(blocks.mT @ (blocks @ basis)).Q
    return float(torch.linalg.svdvals((blocks @ basis).double()).max())
