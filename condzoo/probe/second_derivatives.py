"""Dense Hessian and generalized Gauss-Newton matrices by reverse mode, a block of rows at a time.

Shapes: P parameters, N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 128  # vectors pulled back at once, at most
NUMBERS = 1 << 27  # numbers in the gradients of all outputs for these vectors together: 1 GB


def rows_at_once(outputs: int) -> int:
    """How many vectors are pulled back at once through a network whose modules have so many outputs together."""
    return max(1, min(ROWS, NUMBERS // max(1, outputs)))


def hessian_matrix(loss: Tensor, parameters: Sequence[Tensor], rows: int = ROWS) -> Float[Tensor, "p p"]:
    """d^2 loss / dw^2, symmetrized against round-off."""
    first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.flatten() for g in first])
    if not gradient.requires_grad:  # the loss is linear in all of them
        return gradient.new_zeros((gradient.numel(), gradient.numel()))
    side = gradient.numel()
    hessian = gradient.new_empty((side, side))
    for start in range(0, side, rows):
        units = gradient.new_zeros((min(rows, side - start), side))
        units.diagonal(start).fill_(1)
        hessian[start : start + rows] = pulled_back(gradient, parameters, units)
    return (hessian + hessian.T) / 2


def ggn_matrix(logits: Float[Tensor, "n k"], parameters: Sequence[Tensor], rows: int = ROWS) -> Float[Tensor, "p p"]:
    """(1/N) J^T H J for softmax cross-entropy, J the Jacobian of all logits as one function of the batch.

    H = diag(p) - p p^T = S S^T with S = diag(sqrt p) - p sqrt(p)^T, so it is a sum of outer products of
    the gradients of S's columns.
    """
    samples, classes = logits.shape
    p = logits.detach().softmax(dim=1)
    factors = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # [n, k, column]
    total = logits.new_zeros((sum(w.numel() for w in parameters),) * 2)
    for sample in range(0, samples, max(1, rows // classes)):
        chosen = range(sample, min(samples, sample + max(1, rows // classes)))
        signals = logits.new_zeros((len(chosen), classes, samples, classes))
        for i, n in enumerate(chosen):
            signals[i, :, n] = factors[n].T
        pulled = pulled_back(logits, parameters, signals.flatten(0, 1), rows)
        total.addmm_(pulled.T, pulled)
    return total / samples


def pulled_back(
    outputs: Tensor, parameters: Sequence[Tensor], signals: Float[Tensor, m * shape], rows: int = ROWS
) -> Float[Tensor, "m p"]:
    """Each signal's gradient of all parameters together, as a row; `rows` of them at once."""
    parts = []
    for some in signals.split(rows):
        try:
            parts.append(_rows(outputs, parameters, some, True))
        except RuntimeError:  # vmap cannot run dropout that checkpointing repeats, or some backward of a user's
            parts += [_rows(outputs, parameters, signal, False) for signal in some]
    return torch.cat(parts)


def _rows(outputs: Tensor, parameters: Sequence[Tensor], some: Tensor, batched: bool) -> Tensor:
    grads = torch.autograd.grad(
        outputs, parameters, some, retain_graph=True, is_grads_batched=batched, allow_unused=True
    )
    count = len(some) if batched else 1
    filled = [p.new_zeros(count, p.numel()) if g is None else g for g, p in zip(grads, parameters, strict=True)]
    return torch.cat([g.reshape(count, -1) for g in filled], dim=1)
