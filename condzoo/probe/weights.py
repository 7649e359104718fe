"""Largest singular value and Frobenius norm of a layer's weight and of its gradient.

The ratio of the largest singular values is weight domination:

sigma_max(dL/dW) / sigma_max(W) small means that one step hardly changes the layer
(arXiv:2002.10801, sec. 4.1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condzoo.probe.arithmetic import plain_products
from condzoo.probe.eigenvalues import eigvalsh, near
from condzoo.probe.hooks import Hook

EXACT = 1024  # smaller side up to which all singular values are computed
STACKED = 1 << 22  # elements converted to float64 together: 32 MB
BLOCK, STEPS = 8, 24  # of the block Krylov subspace beyond it


@dataclass(frozen=True)
class Norms:
    """sigma_max and Frobenius norm of one weight or gradient, in its units; sigma_max of the largest group."""

    sigma_max: float
    frobenius: float


def own_weight(module: nn.Module) -> Tensor | None:
    """The layer's weight if it is a plain parameter: not computed by a parametrization, nor a quantized one's codes.

    In a pass of FSDP's a view of its flat parameter stands among the parameters.
    """
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.is_floating_point() else None


def watch_computed(module: nn.Module, report: Callable[[Tensor | None], None]) -> RemovableHandle:
    """Report a weight that is computed from other parameters, each time it is computed for a forward pass.

    By a parametrization of torch's, or by a hook that puts it beside the parameters (the older weight_norm and
    spectral_norm, pruning, sharded training), which is then reported after the call: such a hook may have been put on
    later than this one. None where there is no such weight.
    """
    parametrized = getattr(module, "parametrizations", None)
    if parametrized is not None and "weight" in parametrized:
        computing = parametrized["weight"]
        return computing.register_forward_hook(Hook(lambda _, args, weight: report(weight), computing))
    return module.register_forward_hook(Hook(partial(_report_computed, report), module), prepend=True)


def _report_computed(report: Callable[[Tensor | None], None], module: nn.Module, args: object, h: object) -> None:
    weight = vars(module).get("weight")
    report(weight if isinstance(weight, Tensor) else None)


def weight_matrices(module: nn.Module, weight: Tensor) -> Float[Tensor, "g out in"]:
    """A weight, or its gradient, as one matrix a group.

    [g, d_out / g, d_in / g * kernel]; of a transposed convolution [g, d_in / g, d_out / g * kernel].
    """
    if weight.ndim == 2:
        return weight[None]
    groups = int(getattr(module, "groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def widened(grad: Tensor) -> Tensor:
    """A gradient in at least float32: in bfloat16 a sum stops growing after 256 of a kind."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def norms_of(layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Norms]:
    """Norms of weights, or of their gradients, by layer name.

    Exact (from the smaller Gram side, in float64, all of one shape at once) up to 1,024; sigma_max beyond by
    a Krylov subspace (`dominant`). A tensor with NaN or Inf has none and is left out, as is one of a layer without
    outputs.
    """
    if not tensors:
        return {}
    with plain_products(next(iter(tensors.values())).device.type):
        return _norms_of(layers, tensors)


def _norms_of(layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Norms]:
    same_shape: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = defaultdict(list)
    found: dict[str, Norms] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        blocks = weight_matrices(layers[name], tensor.detach())
        if min(blocks.shape[1:]) <= EXACT:
            same_shape[blocks.shape, tensor.dtype, tensor.device].append(name)
        elif bool(torch.isfinite(blocks.sum(dtype=torch.float64))):
            wide = blocks if blocks.shape[1] <= blocks.shape[2] else blocks.mT
            found[name] = Norms(dominant(wide), float(torch.linalg.vector_norm(wide, dtype=torch.float64)))
    for (shape, _, _), same in same_shape.items():
        step = max(1, STACKED // shape.numel())
        for names in (same[i : i + step] for i in range(0, len(same), step)):
            stacked = torch.stack([weight_matrices(layers[name], tensors[name].detach()) for name in names])
            found |= {n: norms for n, norms in zip(names, _exact(stacked), strict=True) if norms is not None}
    return {name: found[name] for name in tensors if name in found}


def _exact(stacked: Float[Tensor, "n g out in"]) -> list[Norms | None]:
    """The norms of each of n weights, None for one that is not finite."""
    blocks = stacked.double()
    wide = blocks if blocks.shape[2] <= blocks.shape[3] else blocks.mT
    grams = near(wide @ wide.mT)  # one copy from a GPU; the numbers that follow are then there to read
    traces = grams.diagonal(dim1=-2, dim2=-1).sum((1, 2))
    finite = torch.isfinite(traces)
    if not bool(finite.all()):
        grams[~finite] = 0.0
    tops = eigvalsh(grams)[:, :, -1].amax(1).clamp(min=0).sqrt().tolist()
    squares = traces.sqrt().tolist()
    return [Norms(t, f) if good else None for t, f, good in zip(tops, squares, finite.tolist(), strict=True)]


def dominant(blocks: Float[Tensor, "g m n"]) -> float:
    """sigma_max from a block Krylov subspace of 24 times 8 vectors.

    Right to about 1e-5, also for random weights, whose largest singular values lie close together.
    """
    scale = float(blocks.abs().max())
    if not scale:
        return 0.0
    blocks = (blocks if blocks.dtype == torch.float64 else blocks.float()) / scale  # its square would leave float32
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((blocks.shape[1], BLOCK), generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(start.to(blocks)).Q.expand(blocks.shape[0], -1, -1)
    image = blocks @ (blocks.mT @ basis)
    images = image
    for _ in range(min(STEPS, blocks.shape[1] // BLOCK) - 1):
        for _ in range(3):  # of a weight of low rank only round-off is left, and the first leaves much of it in place
            image = torch.linalg.qr(image - basis @ (basis.mT @ image)).Q
        basis = torch.cat([basis, image], dim=2)
        image = blocks @ (blocks.mT @ image)
        images = torch.cat([images, image], dim=2)
    squares = eigvalsh((basis.mT @ images).double())
    return scale * math.sqrt(float(squares.max()))
