"""The spectrum of M or F from samples' gradients, which stay factors wherever the smaller Gram side allows.

Shapes: N samples, K label draws a sample, V = K * N vectors, P parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from condzoo.probe.arithmetic import float64_noise
from condzoo.probe.costs import announce, check_side, cost
from condzoo.probe.finiteness import nonfinite
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.sample_gradients import DenseRows
from condzoo.probe.spectra import Spectrum, from_blocks

SLICE = 1 << 24  # numbers of samples' products that are formed at a time: 128 MB, or as many as the block they are for


def spectrum_of_rows(rows: Sequence[LayerRows | DenseRows], samples: int, parameters: int) -> Spectrum:
    """The spectrum of (1/N) R^T R, R: [N * K, P], without forming R where N * K is the smaller side.

    `parameters` are those of the rows, and of layers that the forward pass does not call: eigenvalues of 0.
    """
    vectors, reached = rows[0].vectors, sum(layer.parameters for layer in rows)
    side = min(vectors, reached)
    check_side(side)
    announce(cost(side, _operations(rows, samples, reached), device=rows[0].device), "exact curvature")
    small = torch.zeros((side, side), dtype=torch.float64, device=rows[0].device)
    factored = [layer for layer in rows if isinstance(layer, LayerRows) and layer.single_position]
    if vectors <= reached:
        for layer in rows:
            small += layer.gram()
    elif len(factored) == len(rows):
        small = _from_factors(factored, samples)
    else:
        for start in range(0, vectors, 512):
            part = torch.cat([layer.dense(slice(start, start + 512)) for layer in rows], dim=1)
            small.addmm_(part.T, part)
    values = eigenvalues(small / samples)
    padded = torch.cat([values, values.new_zeros(parameters - side)])
    floor = float64_noise(side, max(0.0, float(values.max())))
    how = "float64, a random sign a sample" if rows[0].random_signs else "exact, float64"
    return from_blocks(padded[None], floor, vectors, arithmetic=how)


def eigenvalues(matrix: Float[Tensor, "p p"]) -> Float[Tensor, " p"]:
    """Of an exact matrix, ascending, on the CPU.

    Raises:
        ValueError: it holds NaN or Inf, which the network's output did not.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(nonfinite("the matrix of the network's gradients"))
    return torch.linalg.eigvalsh(matrix).cpu()


def _operations(rows: Sequence[LayerRows | DenseRows], samples: int, parameters: int) -> float:
    """Floating-point operations of the products in `spectrum_of_rows`."""
    vectors = rows[0].vectors
    if vectors > parameters:
        formed = samples if all(layer.single_position for layer in rows) else 2 * vectors
        return float(formed) * parameters**2
    widths = [
        layer.inputs[0].shape[3] + layer.grads[0][0].shape[3]
        if isinstance(layer, LayerRows) and layer.single_position
        else layer.parameters
        for layer in rows
    ]
    return 2.0 * vectors**2 * sum(widths)


def _from_factors(rows: list[LayerRows], samples: int) -> Float[Tensor, "p p"]:
    """R^T R of layers with one position a sample, block by block, summed over the label draws first.

    Block (k, m) is sum_n G_n (x) x_n x_n^T with G_n = sum_draws g_k g_m^T, one product of [o o', N] and
    [N, i i']: a factor K less than by the rows. A bias is a last input of 1.
    """
    inputs, grads = [], []
    for layer in rows:
        x = layer.inputs[0][:, 0, 0]
        inputs.append(torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if layer.bias else x)
        grads.append(torch.stack([calls[0][:, 0, 0] for calls in layer.grads], dim=1))  # [n, draws, o]
    blocks: dict[tuple[int, int], Tensor] = {}
    for k, m in itertools.combinations_with_replacement(range(len(rows)), 2):
        shape = (grads[k].shape[2], grads[m].shape[2], inputs[k].shape[1], inputs[m].shape[1])
        total = inputs[k].new_zeros((shape[0] * shape[1], shape[2] * shape[3]))
        step = max(1, max(SLICE, total.numel()) // sum(total.shape))
        for some in (slice(start, start + step) for start in range(0, samples, step)):
            summed = (grads[k][some].mT @ grads[m][some]).flatten(1)  # [n, o * o']
            outer = (inputs[k][some, :, None] * inputs[m][some, None]).flatten(1)  # [n, i * i']
            total.addmm_(summed.T, outer)
        block = total.reshape(shape).permute(0, 2, 1, 3)
        blocks[k, m] = block.reshape(shape[0] * shape[2], shape[1] * shape[3])
        blocks[m, k] = blocks[k, m].T
    return torch.cat([torch.cat([blocks[k, m] for m in range(len(rows))], dim=1) for k in range(len(rows))])
