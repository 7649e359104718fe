"""An exact curvature matrix and all of its layers' diagonal blocks, from one set of passes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from condzoo.probe.arguments import checked, whole_seed
from condzoo.probe.batches import batch_size
from condzoo.probe.exact import (
    MATRICES,
    exact_layers,
    formed_whole,
    in_float64_copies,
    own_parameters,
    rows_of,
    spectrum_of_matrix,
    whole_matrix,
)
from condzoo.probe.layer_rows import LayerRows
from condzoo.probe.losses import Loss
from condzoo.probe.preserving import preserved
from condzoo.probe.row_spectra import spectrum_of_rows
from condzoo.probe.sample_gradients import DenseRows
from condzoo.probe.spectra import Spectrum


def curvature_blocks(
    model: nn.Module,
    x: Any,
    y: Any,
    matrix: str = "fisher",
    *,
    loss: Loss | None = None,
    seed: SupportsIndex = 0,
    reduction: str | None = None,
) -> dict[str | None, Spectrum]:
    """`curvature` of the whole network, under None, and of each layer's block, under its name; arguments as there.

    The passes, and the Hessian, are made once for all: of a network of L layers it takes about the time of the whole
    matrix, where `curvature` block by block takes up to L + 1 times as long. Layers that the forward pass does
    not call have no block of M, F and G; of H, and of G under batch statistics, theirs is 0.

    Raises:
        ValueError: as `curvature`.

    Source: arXiv:2002.10801, appendix, Figs. I-IV.
    """
    seed = whole_seed(seed)
    checked("matrix", matrix, MATRICES)
    model, x, y, loss = in_float64_copies(model, x, y, matrix, loss, reduction)
    layers = exact_layers(model, None)
    columns = _columns(layers)
    with preserved(model, seed), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if formed_whole(model, matrix):
            formed, vectors = whole_matrix(model, layers, x, y, loss, matrix, reduction)
            blocks = {name: formed[own][:, own] for name, own in columns.items()}
            return {name: spectrum_of_matrix(part, vectors) for name, part in [(None, formed), *blocks.items()]}
        rows = rows_of(model, layers, x, y, loss, matrix, seed, reduction=reduction)
    samples, parameters = batch_size(x), sum(p.numel() for p in own_parameters(layers))
    found: dict[str | None, Spectrum] = {None: spectrum_of_rows(rows, samples, parameters)}
    for name, own in columns.items():
        parts = (_of_layer(layer, name, own) for layer in rows)
        if kept := [part for part in parts if part is not None]:
            found[name] = spectrum_of_rows(kept, samples, len(own))
    return found


def _columns(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Where each layer's weights and biases are among those of all; what is shared is in the block of each sharer."""
    parameters = own_parameters(layers)
    ends = itertools.accumulate(p.numel() for p in parameters)
    places = {id(p): torch.arange(end - p.numel(), end, device="cpu") for p, end in zip(parameters, ends, strict=True)}
    return {name: torch.cat([places[id(p)] for p in own_parameters({name: module})]) for name, module in layers.items()}


def _of_layer(rows: LayerRows | DenseRows, name: str, own: Tensor) -> LayerRows | DenseRows | None:
    """What of these rows is the layer's."""
    if isinstance(rows, DenseRows):
        return DenseRows(rows.gradients[:, own], rows.used[own]) if rows.used[own].any() else None
    return rows if rows.name == name else None
