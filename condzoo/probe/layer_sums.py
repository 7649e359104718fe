"""What a capture keeps of a layer, and how a call's input is added to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from condzoo.probe.arithmetic import Precision
from condzoo.probe.layers import Conv, input_columns, reading, with_constant
from condzoo.probe.moments import RunningMoment
from condzoo.probe.patch_products import patch_products
from condzoo.probe.products import SharedProducts


@dataclass(eq=False)
class LayerSums:
    """What one layer has shown so far; `hidden`: why its rows cannot be seen, if so."""

    input: RunningMoment = field(default_factory=RunningMoment)
    output_grad: RunningMoment = field(default_factory=RunningMoment)
    samples: int = 0
    hidden: str | None = None


def add_input(
    moment: RunningMoment,
    module: nn.Module,
    x: Tensor,
    conv: Conv,
    precision: Precision,
    *,
    bias: bool,
    shared: SharedProducts,
) -> None:
    """Add the rows of a layer's input, with a constant 1 as one more coordinate if `bias`."""
    read, rows = (*reading(module, conv), bias), x.detach()
    if conv == "patches" and not bias and (patches := patch_products(module, rows)) is not None:
        moment.add_product(*patches, rows, precision, once=partial(shared.once, x, read))
        return
    for i, columns in enumerate(input_columns(module, rows, conv)):
        once = partial(shared.once, x, (*read, i, columns.shape))
        moment.add(with_constant(columns) if bias else columns, precision, once=once)
