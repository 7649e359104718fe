"""F's expectation over independent labels where samples interact, in few draws.

Under batch statistics sample n's gradient of a layer's output depends on the labels of all samples,

    g_n = sum_m A_nm (p_m - e_{y_m})        with the labels y_m independent,

so E[g_n g_n^T] is a sum over N * K backward passes, one for each sample m and class, of which all N samples have
a gradient each. Of N * N * K gradients no more than their sum of products is kept, an [o, o] matrix for each sample,
whose square root's o columns stand for the draws: they have the same second moment.
Shapes: N samples, K classes, o outputs of all layers together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from condzoo.probe.costs import announce_passes, now

AT_ONCE = 64  # backward passes that run as one
MOST = 125_000_000  # numbers in the sums of products together: 1 GB, of which three copies are held for a while


def few_enough(samples: int, outputs: int) -> bool:
    """Whether the sums of products, [N, o, o], can be held."""
    return samples * outputs**2 <= MOST


def equivalent_draws(
    logits: Tensor, edges: Sequence[GradientEdge], widths: Sequence[int], signals: Iterator[Tensor]
) -> list[list[Float[Tensor, "n o"]]]:
    """Gradients at the edges of at most o draws that have the second moment of all signals' together.

    Args:
        logits: to pull back from, [N, K].
        edges: of the layers' outputs, each a row of `width` a sample.
        widths: of these.
        signals: to pull back, each like the logits.

    Returns:
        For each draw a tensor [N, width] an edge.

    Warns:
        UserWarning: after the first passes, if all will take over a minute.
    """
    samples, outputs = logits.shape[0], sum(widths)
    total = logits.new_zeros((samples, outputs, outputs))
    began, passes = now(logits.device), logits.numel()
    for number, some in enumerate(iter(lambda: list(itertools.islice(signals, AT_ONCE)), [])):
        draws = torch.cat(_pulled_back(logits, edges, widths, some), dim=2).transpose(0, 1)
        total.baddbmm_(draws.mT, draws)
        if number == 0:
            announce_passes((now(logits.device) - began) * passes / len(some), passes)
    values, vectors = torch.linalg.eigh(total)  # ascending: of fewer passes than outputs the first are 0
    roots = (vectors * values.clamp_min(0).sqrt()[:, None])[:, :, -min(passes, outputs) :]
    return [list(draw.split(list(widths), dim=1)) for draw in roots.unbind(2)]


def _pulled_back(
    logits: Tensor, edges: Sequence[GradientEdge], widths: Sequence[int], signals: list[Tensor]
) -> list[Float[Tensor, "m n o"]]:
    """Each signal's gradients at each edge, zero where none arrives."""

    def grads(signal: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            logits, edges, signal, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    try:
        found = grads(torch.stack(signals), True)
    except RuntimeError:  # vmap cannot run dropout that activation checkpointing repeats, or some backward of a user's
        each = [grads(signal, False) for signal in signals]
        found = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))
    shape = len(signals), logits.shape[0]
    return [  # a layer on [n, 1, d] has a row a sample, too
        logits.new_zeros((*shape, width)) if grad is None else grad.reshape(*shape, width)
        for grad, width in zip(found, widths, strict=True)
    ]
