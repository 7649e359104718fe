"""Which layers stand out: the ones whose numbers are far from the median of their namesakes, or of all layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from condzoo.probe.spectra import Spectrum

if TYPE_CHECKING:
    from condzoo.probe.conditioning import Conditioning, LayerConditioning

SHOWN = 4  # layers a column, in the text
FEWEST_LAYERS = 3  # of two layers neither is the odd one
FEWEST_NAMESAKES = 4
NUMBER = re.compile(r"(?:.*_)?\d+")  # a part of a name: "3", and torchvision's "encoder_layer_3"
ZEROS = {
    "lmax(x)": "no signal arrives",
    "lmax(g)": "no gradient arrives",
    "dW/W": "the weight gets no gradient",
}


@dataclass(frozen=True)
class Outlier:
    """A layer that is far from the median of those like it in one quantity.

    Attributes:
        layer: its name.
        quantity: the table's column: "lmax(x)", "lmax(g)", "k50(x)", "k50(g)" or "dW/W".
        value: the layer's.
        median: over the layers that it is compared with, those that are 0 left out; 0 where there are none.
    """

    layer: str
    quantity: str
    value: float
    median: float

    @property
    def ratio(self) -> float:
        """Value over median: above 1 for a layer that has too much, below for one that has too little or nothing."""
        return self.value / self.median if self.value else 0.0


def outliers(conditioning: Conditioning, factor: float = 10.0, p: float = 0.5) -> list[Outlier]:
    """The layers that have `factor` times the median of those like them or more, or its `factor`-th part or less.

    A layer is held against its namesakes in other blocks where they are four or more: a transformer's qkv, proj, fc1
    and fc2 differ by what they do, in every block. Others are held against all layers.

    Magnitudes and `weight_domination` are held against the median in both directions, condition numbers upwards
    alone. A layer that is at 0 is named whatever the others are, and they are compared without it: so also where no
    gradient reaches most of a network. A condition number of which only a lower bound is known counts as that; one
    with a structural null or fewer rows than dimensions does not count, nor does what is not finite, was not
    measured, or is of a frozen weight. The gradient at each position of a feature map is the smaller the more
    positions there are, so lambda_max of the output gradients is compared among layers with equally many in their
    output.

    Args:
        conditioning: the measurement.
        factor: above 1.
        p: fraction of the spectrum of the condition numbers.

    Returns:
        By quantity, in the order of the table's columns, and within one the furthest from the median first. Empty
        where no layer stands out; fewer than three layers (that are not 0) are not compared.

    Raises:
        ValueError: a factor that is not above 1, a p outside (0, 1].
    """
    if not factor > 1:
        raise ValueError(f"factor must be above 1: {factor!r}")
    found = []
    for quantity, value_of in _quantities(p).items():
        values = {name: value for name, layer in conditioning.items() if math.isfinite(value := value_of(layer))}
        places = {name: _places(conditioning[name]) if quantity == "lmax(g)" else 0 for name in values}
        compared = [{n: values[n] for n in values if places[n] == here} for here in sorted(set(places.values()))]
        far = [o for same in compared for o in _against_median(quantity, same)]
        far = [o for o in far if o.ratio >= factor or (o.ratio <= 1 / factor and not quantity.startswith("k"))]
        found += sorted(far, key=_distance, reverse=True)
    return found


def _against_median(quantity: str, values: dict[str, float]) -> list[Outlier]:
    """Each layer beside the median of those like it that are not 0; of too few to compare, those that are 0."""
    everything = [value for value in values.values() if value > 0]
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        if value > 0:
            groups.setdefault(_namesakes(name), []).append(value)
    found = []
    for name, value in values.items():
        like = groups.get(_namesakes(name), [])
        like = like if len(like) >= FEWEST_NAMESAKES else everything
        if len(like) >= FEWEST_LAYERS or value == 0:
            found.append(Outlier(name, quantity, value, median(like) if like else 0.0))
    return found


def _namesakes(name: str) -> str:
    """ "blocks.*.mlp.0" of "blocks.3.mlp.0", and "features.*" of "features.3".

    A number at the end is the place in a block where one before says which block, and else the layer's own.
    """
    *blocks, last = name.split(".")
    starred = ["*" if NUMBER.fullmatch(part) else part for part in blocks]
    return ".".join([*starred, "*" if last.isdigit() and "*" not in starred else last])


def outlier_lines(conditioning: Conditioning, p: float = 0.5, factor: float = 10.0) -> list[str]:
    """The outliers as lines below the table, one a column; none where there are too few layers to compare."""
    found = outliers(conditioning, factor, p)
    lines = _zero_lines(found)
    columns: dict[str, list[Outlier]] = {}
    for outlier in found:
        if outlier.value:
            columns.setdefault(outlier.quantity, []).append(outlier)
    if columns:
        of = "the median of the layers like them"
        head = f"stand out, having {factor:g} times {of} or more, or a {factor:g}th or less:"
        lines += [head, *(f"  {quantity}: {_listed(its)}" for quantity, its in columns.items())]
    elif not lines and len(conditioning) >= FEWEST_LAYERS:
        lines = [f"no layer stands out: none has {factor:g} times the median of the layers like it, or a {factor:g}th"]
    return lines


def _zero_lines(found: list[Outlier]) -> list[str]:
    """The layers that get nothing, apart: no ratio says how far they are, and one cause has many of them."""
    lines, named = [], set[str]()
    for quantity, what in ZEROS.items():
        names = [o.layer for o in found if o.quantity == quantity and not o.value]
        # a weight between no signal or no gradient has none: those lines say why
        if names := [name for name in names if quantity != "dW/W" or name not in named]:
            lines.append(f"{what} ({quantity} = 0): {first_of([name or '(model)' for name in names])}")
        named |= set(names)
    return lines


def _quantities(p: float) -> dict[str, Callable[[LayerConditioning], float]]:
    """What is compared, by the table's column; NaN for a layer that does not have it."""
    return {
        "lmax(x)": lambda layer: layer.input.lambda_max,
        f"k{100 * p:g}(x)": lambda layer: _condition_number(layer.input, p),
        "lmax(g)": lambda layer: layer.output_grad.lambda_max,
        f"k{100 * p:g}(g)": lambda layer: _condition_number(layer.output_grad, p),
        "dW/W": lambda layer: math.nan if layer.frozen or (dw := layer.weight_domination) is None else dw,
    }


def _places(layer: LayerConditioning) -> int:
    """Positions of the layer's output an example: of a strided convolution fewer than of its input."""
    rows = layer.output_grad.rows  # with labels="model" as many times more in every layer
    return layer.positions if rows is None else rows // max(1, layer.samples)


def _condition_number(spectrum: Spectrum, p: float) -> float:
    return spectrum.at_least(p) if spectrum.status(p) in ("ok", "bound") else math.nan


def _distance(outlier: Outlier) -> float:
    return abs(math.log(outlier.ratio)) if outlier.ratio > 0 else math.inf


def _listed(found: list[Outlier]) -> str:
    """ "fc 48x, conv1 0.09x and 3 more"."""
    return first_of([f"{o.layer or '(model)'} {o.ratio:.2g}x" for o in found])


def first_of(names: list[str]) -> str:
    """ "a, b, c, d and 3 more"."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
