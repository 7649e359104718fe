"""The loss of a batch, always as the batch mean L, so that g = B * dL/dh is a sample's own gradient where
samples do not interact.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condzoo.probe.batches import on_device
from condzoo.probe.label_models import SOFTMAX, classes_second, distribution_of

Labels = Literal["data", "model", "sample"]
LABELS = ("data", "model", "sample")
REDUCTIONS = ("mean", "sum")
NOTHING = "the loss does not depend on the model's parameters, or it has none: nothing to measure"
Loss = Callable[[Any, Any], Tensor]


def name_of(loss: Loss | None) -> str:
    """How a record names the loss."""
    if loss is None:
        return "cross_entropy"
    while isinstance(loss, partial):
        loss = loss.func
    if isinstance(loss, type) or not callable(loss):
        hint = f"make one: loss={loss.__name__}()" if isinstance(loss, type) else "for example torch.nn.MSELoss()"
        raise TypeError(f"loss must be a callable of (output, y), got {loss!r:.60}; {hint}")
    return getattr(loss, "__name__", type(loss).__name__)


def logits_of(output: Any) -> Any:
    """A model's output, or the `logits` in it (Hugging Face's outputs and dicts)."""
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def own_loss_of(output: Any) -> Tensor | None:
    """The loss that a model returned with its output (Hugging Face's, when called with labels)."""
    value = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return value if isinstance(value, Tensor) and value.ndim == 0 else None


def reduction_of(loss: Loss | None) -> str:
    """ "sum" where the loss says so by its `.reduction` or in a functools.partial, else "mean"."""
    while isinstance(loss, partial):
        if "reduction" in loss.keywords:
            return "sum" if loss.keywords["reduction"] == "sum" else "mean"
        loss = loss.func
    return "sum" if getattr(loss, "reduction", "mean") == "sum" else "mean"


def masked_labels(loss: Any, target: Any) -> tuple[int, int]:
    """How many labels a cross-entropy leaves out of its mean (`ignore_index`), and of how many."""
    ignored = -100
    while isinstance(loss, partial):
        ignored, loss = loss.keywords.get("ignore_index", ignored), loss.func
    ignored = getattr(loss, "ignore_index", ignored)  # None, in losses of others
    if not isinstance(target, Tensor) or target.is_floating_point() or not isinstance(ignored, int):
        return 0, 0
    return int((target == ignored).sum()), target.numel()


def loss_on(loss: Any, device: torch.device) -> Any:
    """The loss with its own tensors, such as class weights, on a device; a copy where they are elsewhere."""
    if isinstance(loss, nn.Module):
        held = itertools.chain(loss.parameters(), loss.buffers())
        return copy.deepcopy(loss).to(device) if any(t.device != device for t in held) else loss
    if isinstance(loss, partial):
        return partial(loss_on(loss.func, device), *on_device(loss.args, device), **on_device(loss.keywords, device))
    return loss


def modules_of(loss: Any) -> list[nn.Module]:
    """The modules that a loss is, or is a method of, also in a functools.partial: what they hold may change in it."""
    if isinstance(loss, partial):
        return [module for part in (loss.func, *loss.args, *loss.keywords.values()) for module in modules_of(part)]
    owner = getattr(loss, "__self__", loss)
    return [owner] if isinstance(owner, nn.Module) else []


def mean_loss(loss: Loss | None, output: Any, target: Any, batch: int, reduction: str | None = None) -> Tensor:
    """The batch-mean loss: a sum is divided by the batch, a loss a sample is averaged.

    Args:
        loss: torch's own losses get the output's logits, any other callable the output itself. None: the
            loss that the output holds, else cross-entropy.
        output, target: of the batch.
        batch: its samples.
        reduction: of the loss, "mean" or "sum"; None: what the loss says itself.

    Raises:
        ValueError: the loss is neither a scalar nor one number a sample.
    """
    if loss is None:
        own = own_loss_of(output)
        if own is None:
            return _cross_entropy(output, target)
        return own / batch if reduction == "sum" else own
    kind = distribution_of(loss)
    logits = logits_of(output) if kind else output
    value = loss(classes_second(logits, target) if kind in SOFTMAX else logits, target)
    if not isinstance(value, Tensor) or value.ndim > 1 or (value.ndim == 1 and len(value) != batch):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar, or one number a sample [{batch}]; got {got}")
    if value.ndim == 1:
        return value.mean()
    return value / batch if (reduction or reduction_of(loss)) == "sum" else value


def differentiable(value: Tensor) -> Tensor:
    """The value, of which there are gradients.

    Raises:
        ValueError: no parameter has a part in it that autograd knows.
    """
    if not value.requires_grad:
        raise ValueError(NOTHING)
    return value


def _cross_entropy(output: Any, target: Any) -> Tensor:
    logits = logits_of(output)
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        got = f"{type(logits).__name__} and {type(target).__name__}"
        raise ValueError(
            "without loss= the model must return logits (a tensor, or an output with .logits) and the targets be a "
            f"tensor, got {got}; pass loss=lambda output, y: ..."
        )
    return F.cross_entropy(classes_second(logits, target), target)
