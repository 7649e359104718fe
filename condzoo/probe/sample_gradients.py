"""Per-sample gradients themselves, for layers without the factors of `gradient_rows`, where samples do not interact.

Such are projections inside nn.MultiheadAttention, transposed convolutions, weights that are used more than once. A
backward pass a sample and label draw, of whose signal all other samples' part is zero.
Shapes: N samples, K label draws a sample (1 with labels from the data), V = K * N vectors, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from condzoo.probe.batches import batch_size, call
from condzoo.probe.costs import A_SAMPLE_AND_CLASS, announce_passes, now
from condzoo.probe.finiteness import checked_finite
from condzoo.probe.gradient_rows import SAME, label_signals
from condzoo.probe.label_models import gradients_one_by_one
from condzoo.probe.losses import Loss, differentiable, logits_of, mean_loss
from condzoo.probe.second_derivatives import pulled_back

MOST = 500_000_000  # numbers in the gradients together: 4 GB


@dataclass(frozen=True, eq=False)
class DenseRows:
    """All gradients, with what `LayerRows` has.

    Attributes:
        gradients: of the parameters together, a vector a row.
        used: which of the parameters the logits depend on.
    """

    gradients: Float[Tensor, "v p"]
    used: Bool[Tensor, " p"]
    single_position = False
    random_signs = False

    @property
    def vectors(self) -> int:
        """V."""
        return self.gradients.shape[0]

    @property
    def parameters(self) -> int:
        """P."""
        return self.gradients.shape[1]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.gradients.device

    def dense(self, which: slice) -> Float[Tensor, "v p"]:
        """Some of the gradients."""
        return self.gradients[which]

    def gram(self) -> Float[Tensor, "v v"]:
        """All their inner products."""
        return self.gradients @ self.gradients.T

    def times(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " v"]:
        """Their inner products with a vector."""
        return self.gradients @ vector

    def transposed_times(self, inner: Float[Tensor, " v"]) -> Float[Tensor, " p"]:
        """Their sum, each times its number."""
        return self.gradients.T @ inner


def sample_gradients(
    model: nn.Module,
    parameters: Sequence[Tensor],
    x: Any,
    y: Any,
    loss: Loss | None,
    matrix: str,
    reduction: str | None = None,
) -> DenseRows | None:
    """The gradients of every sample, in the order draw by draw; None where the loss is no function of the logits alone.

    Raises:
        ValueError: they are too many to hold, the output or the loss is not finite, or no parameter has a part in it.
    """
    output, samples = call(model, x), batch_size(x)
    predicted = checked_finite(logits_of(output))
    if not isinstance(predicted, Tensor) or not predicted.requires_grad:
        return None
    value = None
    if matrix == "grad_moment":
        value = differentiable(checked_finite(mean_loss(loss, output, y, samples, reduction), "the loss"))
        (signal,) = torch.autograd.grad(value, predicted, retain_graph=True, allow_unused=True)
        if signal is None:
            return None
    draws: Iterable[Tensor] = label_signals(loss, output, y, matrix, samples) if value is None else [signal]
    vectors = predicted.numel() if value is None else samples
    count = sum(p.numel() for p in parameters)
    if vectors * count > MOST:
        raise ValueError(
            f"{vectors:,} gradients of {count:,} parameters are {vectors * count * 8 / 1e9:.1f} GB, at most "
            f"{MOST * 8 / 1e9:.0f} are possible; pass fewer samples, or block='<layer>' for one layer's block"
        )
    reached = torch.autograd.grad(predicted.sum(), parameters, retain_graph=True, allow_unused=True)
    used = torch.cat(
        [torch.full((p.numel(),), g is not None, device="cpu") for p, g in zip(parameters, reached, strict=True)]
    )
    rows: list[Tensor] = []
    began = now(predicted.device)
    for alone in gradients_one_by_one(draws):
        rows.append(pulled_back(predicted, parameters, alone[None]))
        if len(rows) == 1:
            announce_passes((now(predicted.device) - began) * vectors, vectors, each=A_SAMPLE_AND_CLASS)
    gradients = samples * torch.cat(rows)
    if value is not None:
        whole = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        mean = torch.cat([g.flatten() for g in whole])
        if float((gradients.mean(0) - mean).norm()) > SAME * float(gradients.norm()) / samples**0.5:
            return None  # the loss sees more than the logits
    return DenseRows(gradients, used)
