"""The distribution over labels that a loss stands for, and the gradients of -log p(y | output) under it.

    softmax        cross-entropy, whatever its class weights or label smoothing
    log-softmax    negative log-likelihood of log-probabilities (nn.NLLLoss)
    gaussian       mean squared error: unit variance, coordinates independent
    bernoulli      binary cross-entropy with logits: coordinates independent

The gradients are those of -log p itself, so F does not depend on the loss's weights, smoothing or reduction.
(For K outputs nn.MSELoss is 2 / K, nn.BCEWithLogitsLoss 1 / K of the batch's mean -log p.)
Shapes: n samples, k classes or coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Distribution = Literal["softmax", "log-softmax", "gaussian", "bernoulli"]

FUNCTIONS: dict[Any, Distribution] = {
    F.cross_entropy: "softmax",
    F.nll_loss: "log-softmax",
    F.mse_loss: "gaussian",
    F.binary_cross_entropy_with_logits: "bernoulli",
}
MODULES: tuple[tuple[type[nn.Module], Distribution], ...] = (
    (nn.CrossEntropyLoss, "softmax"),
    (nn.NLLLoss, "log-softmax"),
    (nn.MSELoss, "gaussian"),
    (nn.BCEWithLogitsLoss, "bernoulli"),
)
ALLOWED = "cross-entropy (softmax), NLL (log-probabilities), MSE (Gaussian) or BCE with logits (Bernoulli) of torch"


def distribution_of(loss: Any) -> Distribution | None:
    """The distribution of one of torch's losses (None: cross-entropy), None of any other callable."""
    while isinstance(loss, partial):
        loss = loss.func
    if loss is None:
        return "softmax"
    by_class = next((found for kind, found in MODULES if isinstance(loss, kind)), None)
    return by_class or (FUNCTIONS.get(loss) if callable(loss) and loss.__hash__ else None)


def checked_distribution(loss: Any, output: Any, asked: str) -> Distribution:
    """The distribution, if the loss has one and the output its shape.

    Args:
        loss, output: of the model.
        asked: what needs it, for the error ("labels='model'").

    Raises:
        ValueError: a free callable, or an output of another shape; says what is allowed.
    """
    found = distribution_of(loss)
    if found is None:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(
            f"{asked} takes labels from the distribution that the loss stands for and needs {ALLOWED}; {name} is a "
            "free function. Pass one of these as loss, or use the labels of the data (labels='data')"
        )
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found in ("softmax", "log-softmax") and not (isinstance(output, Tensor) and output.ndim == 2):
        raise ValueError(f"{asked} needs logits [n, classes], got {shape}; use the labels of the data (labels='data')")
    if not (isinstance(output, Tensor) and output.ndim and output.is_floating_point()):
        raise ValueError(f"{asked} needs a model output that is a tensor [n, ...], got {shape}")
    return found


def weighted_gradients(kind: Distribution, output: Float[Tensor, n * k]) -> Iterator[Float[Tensor, n * k]]:
    """Vectors v_c [n, ...], one a class or coordinate, with n^2 sum_c v_c v_c^T = E_y[g g^T] for each sample.

    g = d(-log p)/d output is p - e_c under a softmax, and f - y with variance 1 or s (1 - s) a coordinate.
    The factor 1/n is that of a batch-mean loss.
    """
    f = output.detach().to(torch.promote_types(output.dtype, torch.float32))
    samples, width = f.shape[0], f[0].numel()
    if kind == "softmax":
        p = f.softmax(dim=1)
        scale, center = p.sqrt(), p
    elif kind == "log-softmax":
        scale, center = (f / 2).exp(), torch.zeros_like(f)
    else:
        flat = f.reshape(samples, width)
        scale = torch.ones_like(flat) if kind == "gaussian" else (flat.sigmoid() * (-flat).sigmoid()).sqrt()
        center = torch.zeros_like(flat)
    for c in range(width):
        vector = center.clone()
        vector[:, c] -= 1
        yield (scale[:, c : c + 1] * vector / samples).reshape(output.shape).to(output.dtype)


def signed_gradients(
    kind: Distribution, output: Float[Tensor, n * k], generator: torch.Generator
) -> Iterator[Float[Tensor, n * k]]:
    """`weighted_gradients`, each sample's vector with a random sign.

    Without effect where samples do not interact; under batch statistics it makes the cross terms between
    samples, which independent labels do not have, zero in expectation.
    """
    for weighted in weighted_gradients(kind, output):
        shape = (weighted.shape[0],) + (1,) * (weighted.ndim - 1)
        yield (torch.randint(0, 2, shape, generator=generator).to(weighted) * 2 - 1) * weighted


def drawn_gradient(
    kind: Distribution, output: Float[Tensor, n * k], generator: torch.Generator
) -> Float[Tensor, n * k]:
    """d(-log p(y)) / d output / n for one label y a sample, drawn from the distribution."""
    f = output.detach().double().cpu()
    if kind in ("softmax", "log-softmax"):
        p = f.softmax(dim=1)
        drawn = F.one_hot(torch.multinomial(p, 1, generator=generator)[:, 0], f.shape[1])
        signal = (p if kind == "softmax" else torch.zeros_like(p)) - drawn
    elif kind == "gaussian":
        signal = torch.randn(f.shape, generator=generator, dtype=torch.float64)
    else:
        signal = f.sigmoid() - torch.bernoulli(f.sigmoid(), generator=generator)
    return (signal / f.shape[0]).to(output)
