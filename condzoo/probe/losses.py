"""The loss of a batch, and the backward passes that a choice of labels asks for.

Everything is in terms of the batch-mean loss L, so that g = B * dL/dh is a sample's own gradient where
samples do not interact.
Shapes: n samples, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Labels = Literal["data", "model", "sample"]
LABELS = ("data", "model", "sample")
Loss = Callable[[Any, Any], Tensor]


def name_of(loss: Loss | None) -> str:
    """How a record names the loss."""
    if loss is None:
        return "cross_entropy"
    return getattr(loss, "__name__", type(loss).__name__)


def logits_of(output: Any) -> Any:
    """A model's output, or the `logits` in it (Hugging Face's outputs and dicts)."""
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def mean_loss(loss: Loss | None, output: Any, target: Any, batch: int) -> Tensor:
    """The batch-mean loss: a sum is divided by the batch, a loss a sample is averaged.

    Raises:
        ValueError: the loss is neither a scalar nor one number a sample.
    """
    if loss is None:
        return F.cross_entropy(logits_of(output), target)
    value = loss(output, target)
    if not isinstance(value, Tensor) or value.ndim > 1 or (value.ndim == 1 and len(value) != batch):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar, or one number a sample [{batch}]; got {got}")
    if value.ndim == 1:
        return value.mean()
    return value / batch if getattr(loss, "reduction", "mean") == "sum" else value


def class_gradients(logits: Float[Tensor, "n k"], generator: torch.Generator) -> Iterator[Float[Tensor, "n k"]]:
    """For each class c, sqrt(p_c) * d(-log p_c)/dlogits / n: their outer products sum to the expectation.

    E over y ~ softmax of g g^T = sum_c p_c g_c g_c^T. Each sample's vector has a random sign: without
    effect where samples do not interact, and under batch statistics it makes the cross terms between
    samples, which independent labels do not have, zero in expectation.
    """
    for weighted in weighted_class_gradients(logits):
        signs = torch.randint(0, 2, (weighted.shape[0], 1), generator=generator).to(weighted) * 2 - 1
        yield signs * weighted


def weighted_class_gradients(logits: Float[Tensor, "n k"]) -> Iterator[Float[Tensor, "n k"]]:
    """For each class c, sqrt(p_c) * (p - e_c) / n."""
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    for c in range(p.shape[1]):
        one_hot = F.one_hot(torch.tensor(c, device=p.device), p.shape[1]).to(p)
        yield (p[:, c : c + 1].sqrt() * (p - one_hot) / p.shape[0]).to(logits.dtype)


def drawn_labels(logits: Float[Tensor, "n k"], generator: torch.Generator) -> Tensor:
    """One label a sample from the model's softmax."""
    p = logits.detach().double().softmax(dim=1).cpu()
    return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)


def check_categorical(loss: Loss | None, logits: Any, labels: str) -> None:
    """labels="model" and "sample" need a softmax over [n, k] logits.

    Raises:
        ValueError: another loss or shape.
    """
    if loss is not None and loss is not F.cross_entropy and not isinstance(loss, nn.CrossEntropyLoss):
        raise ValueError(
            f"labels={labels!r} takes labels from the model's softmax and needs the cross-entropy loss, got "
            f"{name_of(loss)}; use labels='data'"
        )
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"labels={labels!r} needs logits [n, classes], got {got}; use labels='data'")
