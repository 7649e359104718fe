"""One layer's per-sample gradients as factors: rows x and g at each position, never a P-vector a sample.

A layer's gradient for sample n is sum_t g_nt x_nt^T over its positions t (and sum_t g_nt for its bias).
Shapes: N samples, K label draws a sample (1 with labels from the data), T positions, V = K * N vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

SAMPLES = 64  # samples whose gradients are formed at a time, at least
NUMBERS = 1 << 27  # numbers in the gradients formed at a time, where these samples have fewer: 1 GB


@dataclass(eq=False)
class LayerRows:
    """One layer's factors.

    Attributes:
        name: the layer's.
        bias: whether it has one.
        width: d_out / groups.
        inputs: a tensor [N, groups, T, d_in / groups] for each call of the layer.
        grads: for each label draw, a tensor [N, groups, T, d_out / groups] a call.
        samples: N.
        fault: why the gradients by sample are not of these rows; empty where they are.
        random_signs: whether each sample's part of a draw has a random sign, so that the mean over seeds is right.
        edges: where in the graph each call's output is.
    """

    name: str
    bias: bool
    width: int
    samples: int
    fault: str = ""
    random_signs: bool = False
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)

    @property
    def vectors(self) -> int:
        """V, per-sample gradients in all."""
        return len(self.grads) * self.samples

    def dense(self, which: slice) -> Float[Tensor, "v p"]:
        """The gradients themselves, of vectors `which` in the order draw by draw: weight, then bias."""
        x = _joined(self.inputs)
        parts = []
        for draw, indices in self._within(which):
            g = _joined(self.grads[draw])[indices]
            weight = torch.einsum("ngto,ngti->ngoi", g, x[indices]).flatten(1)
            parts.append(torch.cat([weight, g.sum(2).flatten(1)], dim=1) if self.bias else weight)
        return torch.cat(parts)

    @property
    def single_position(self) -> bool:
        """Whether every sample is one row: a linear layer on [N, d], called once."""
        return len(self.inputs) == 1 and self.inputs[0].shape[1:3] == (1, 1)

    @property
    def parameters(self) -> int:
        """P of this layer: weights and biases."""
        x = self.inputs[0]
        return x.shape[1] * self.width * (x.shape[3] + (1 if self.bias else 0))

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.inputs[0].device

    def times(self, vector: Float[Tensor, " p"]) -> Float[Tensor, " v"]:
        """Inner products of all gradients with a vector, without forming them."""
        x, shape = _joined(self.inputs), (self.grads[0][0].shape[1], self.grads[0][0].shape[3], -1)
        count = shape[0] * shape[1] * x.shape[3]
        image = torch.einsum("ngti,goi->ngto", x, vector[:count].reshape(shape))
        if self.bias:
            image = image + vector[count:].reshape(shape[:2])[None, :, None]
        return torch.cat([torch.einsum("ngto,ngto->n", _joined(g), image) for g in self.grads])

    def transposed_times(self, inner: Float[Tensor, " v"]) -> Float[Tensor, " p"]:
        """The sum of all gradients, each times its number."""
        x = _joined(self.inputs)
        total = torch.zeros_like(_joined(self.grads[0]))
        for g, part in zip(self.grads, inner.split(self.samples), strict=True):
            total.addcmul_(_joined(g), part[:, None, None, None])
        weight = torch.einsum("ngto,ngti->goi", total, x).flatten()
        return torch.cat([weight, total.sum((0, 2)).flatten()]) if self.bias else weight

    def gram(self) -> Float[Tensor, "v v"]:
        """All inner products of the gradients: with one position, (X X^T + 1) o (G G^T)."""
        x = _joined(self.inputs)
        if x.shape[1] > 1 or x.shape[2] > 1:
            return _product_in_parts(self)
        g = torch.cat([_joined(grads)[:, 0, 0] for grads in self.grads])
        x = x[:, 0, 0]
        inputs = x @ x.T + (1.0 if self.bias else 0.0)
        return g @ g.T * inputs.repeat(len(self.grads), len(self.grads))

    def _within(self, which: slice) -> Iterator[tuple[int, slice]]:
        for draw in range(len(self.grads)):
            start = max(which.start, draw * self.samples) - draw * self.samples
            stop = min(which.stop, (draw + 1) * self.samples) - draw * self.samples
            if start < stop:
                yield draw, slice(start, stop)


def _joined(calls: list[Tensor]) -> Float[Tensor, "n g t d"]:
    return calls[0] if len(calls) == 1 else torch.cat(calls, dim=2)


def _product_in_parts(layer: LayerRows) -> Float[Tensor, "v v"]:
    """The gradients' inner products from blocks of them: all at once where they are few, else two blocks at a time."""
    total = layer.inputs[0].new_zeros((layer.vectors, layer.vectors))
    step = max(SAMPLES, NUMBERS // layer.parameters)
    blocks = [slice(start, start + step) for start in range(0, layer.vectors, step)]
    for i, one in enumerate(blocks):
        rows = torch.cat([layer.dense(part) for part in _parts(one, layer.vectors)])
        total[one, one] = rows @ rows.T
        for other in blocks[i + 1 :]:
            for part in _parts(other, layer.vectors):
                total[one, part] = rows @ layer.dense(part).T
                total[part, one] = total[one, part].T
    return total


def _parts(block: slice, vectors: int) -> list[slice]:
    """The block's vectors, 64 at a time."""
    stop = min(block.stop, vectors)
    return [slice(start, min(start + SAMPLES, stop)) for start in range(block.start, stop, SAMPLES)]
