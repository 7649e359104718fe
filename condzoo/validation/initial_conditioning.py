"""The conditioning that every model of the zoo has at its initialization: the shipped record, and holding against it.

models/conditioning.json has, for up to `LAYERS` layers of every registered model and for the four numbers of
`QUANTITIES`, the geometric mean over seeds and the standard deviation of the logarithm between them. A seed draws
weights and images anew, so that spread is what a correct network may differ by; threads and processors differ by
round-off, far less, but in networks so deep that they amplify it to the size of the spread. Eight seeds know a spread
roughly (of mlp4x24 some are 2.2 times too small, beside 1,000 seeds'), so that a number which is off by little more
than they allow is held against the spread between further seeds (`widened`).
`python -m condzoo.validation.record_zoo` makes the record again.
"""

import functools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from condzoo.probe import Spectrum, measure

RECORD = Path(__file__).parents[1] / "models" / "conditioning.json"
LAYERS = 16  # of a deeper network as many, evenly spread, the first and the last among them
QUANTITIES = ("input lambda_max", "input kappa", "output gradient lambda_max", "output gradient kappa")
KAPPA = 0.5  # p of kappa, on the complement of the known nulls: batches are smaller than layers are wide
KNOWN = 1e9  # up to here kappa of float64 data is known; beyond it is left out of the record
SPREADS = 6  # a number may be this many standard deviations from the record's
DOUBTFUL = 2.5  # up to so many times that, further seeds decide (of mlp4x24 they often must)
TAIL = 1.25  # some logarithms have a long tail upwards: of 3,000 of mlp4x36_lastbn one is past 6 deviations of 80 seeds

Numbers = dict[str, list[float | None]]  # layer -> one number for each of QUANTITIES, None where it is not known


@dataclass(frozen=True)
class InitialConditioning:
    """One model's record.

    Attributes:
        mean: geometric mean over seeds, by layer; None where some seed's is not known.
        spread: standard deviation of the natural logarithm between seeds, by layer.
    """

    mean: Numbers
    spread: Numbers

    def allowed(self, layer: str, quantity: int) -> float:
        """The largest factor between a number and the record's that is taken for the draw.

        The spread of one number is known from few seeds only, so the model's median of that quantity counts where
        it is larger.
        """
        own = self.spread[layer][quantity] or 0.0
        others = [value for row in self.spread.values() if (value := row[quantity]) is not None]
        return math.exp(min(SPREADS * max(own, statistics.median(others)), 700.0))

    def widened(self, seeds: Sequence[Numbers]) -> "InitialConditioning":
        """This record, its spread `TAIL` times the one between these seeds where that is larger; the means stay.

        So a network whose every seed is as far off remains so.
        """
        found = combine(seeds).spread
        spread = {
            layer: [larger(old, new and TAIL * new) for old, new in zip(row, found[layer], strict=True)]
            for layer, row in self.spread.items()
        }
        return replace(self, spread=spread)


@dataclass(frozen=True)
class Deviation:
    """A number beside the record's: `factor` is the larger over the smaller, `allowed` what it may be."""

    what: str
    measured: float
    recorded: float
    factor: float
    allowed: float

    @property
    def excess(self) -> float:
        """How far it is, 1 being the most that is allowed."""
        if not math.isfinite(self.factor):
            return math.inf
        return math.log(self.factor) / max(math.log(self.allowed), 1e-9)


def measure_initial(model: nn.Module, x: Tensor, y: Tensor) -> Numbers:
    """The numbers of `QUANTITIES`, of a network as it is, for the layers that a record has."""
    layers = spread_over([name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    measured = measure(model, [(x, y)], layers=layers, precision="float64")
    return {
        name: [*summary(measured[name].input), *summary(measured[name].output_grad)]
        if name in measured
        else [None] * len(QUANTITIES)
        for name in layers
    }


def spread_over(names: Sequence[str]) -> list[str]:
    """At most `LAYERS` of the names, evenly spread, with the first and the last."""
    if len(names) <= LAYERS:
        return list(names)
    return [names[round(i * (len(names) - 1) / (LAYERS - 1))] for i in range(LAYERS)]


def summary(spectrum: Spectrum) -> tuple[float | None, float | None]:
    """(lambda_max, kappa), None where it is not known."""
    lambda_max, kappa = spectrum.lambda_max, spectrum.complement_condition_number(KAPPA)
    return (lambda_max if 0 < lambda_max < math.inf else None), (kappa if kappa < KNOWN else None)


def larger(a: float | None, b: float | None) -> float | None:
    """The larger of two numbers; the first, also None, where one is not known."""
    return a if a is None or b is None else max(a, b)


def combine(seeds: Sequence[Numbers]) -> InitialConditioning:
    """The record of a model from the numbers of several seeds."""
    mean: Numbers = {}
    spread: Numbers = {}
    for layer in seeds[0]:
        mean[layer], spread[layer] = [], []
        for quantity in range(len(QUANTITIES)):
            values = [numbers[layer][quantity] for numbers in seeds]
            logs = [math.log(value) for value in values if value is not None]
            known = len(logs) == len(values)
            mean[layer].append(math.exp(statistics.mean(logs)) if known else None)
            spread[layer].append(statistics.stdev(logs) if known else None)
    return InitialConditioning(mean, spread)


@functools.cache
def initial_records() -> dict[str, InitialConditioning]:
    """Model -> its record."""
    models = json.loads(RECORD.read_text(encoding="utf-8"))["models"]
    return {
        name: InitialConditioning(
            {layer: row[: len(QUANTITIES)] for layer, row in layers.items()},
            {layer: row[len(QUANTITIES) :] for layer, row in layers.items()},
        )
        for name, layers in models.items()
    }


def deviations(numbers: Numbers, record: InitialConditioning) -> list[Deviation]:
    """Every number that the record has beside the record's, the worst first.

    A layer that is missing, and a kappa that is not known where the record's is, are infinitely far off.
    """
    found = []
    for layer, recorded in record.mean.items():
        for quantity, wanted in enumerate(recorded):
            if wanted is None:
                continue
            value = numbers.get(layer, [None] * len(QUANTITIES))[quantity]
            factor = math.inf if value is None else max(value / wanted, wanted / value)
            what = f"{QUANTITIES[quantity]} of {layer}"
            found.append(
                Deviation(what, math.inf if value is None else value, wanted, factor, record.allowed(layer, quantity))
            )
    return sorted(found, key=lambda deviation: deviation.excess, reverse=True)
