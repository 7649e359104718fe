"""Verdicts: each claim's measure against its bound, over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from condzoo.experiments.loading import training_of
from condzoo.experiments.measures import MEASURES
from condzoo.experiments.readings import Missing
from condzoo.experiments.schema import Claim, Experiment

Outcome = Literal["held", "did not hold", "not decided"]


@dataclass(frozen=True)
class Verdict:
    """What became of one claim.

    Attributes:
        values: seed -> measured value. why: what is missing, where it is not decided.
    """

    claim: Claim
    outcome: Outcome
    values: dict[int, float]
    why: str = ""

    @property
    def median(self) -> float | None:
        """Over seeds; NaN where one of them is."""
        return median(self.values) if self.values else None

    @property
    def measured(self) -> str:
        """The median and the range over seeds, in words."""
        if not self.values:
            return self.why
        low, high = (float(reduce(list(self.values.values()))) for reduce in (np.min, np.max))
        spread = f" ({low:.3g} to {high:.3g}, n = {len(self.values)})" if len(self.values) > 1 else " (n = 1)"
        return f"{self.median:.3g}{spread}"

    @property
    def bound(self) -> str:
        """The bound, in words."""
        parts = []
        if self.claim.above is not None:
            parts.append(f"above {self.claim.above:g}")
        if self.claim.below is not None:
            parts.append(f"below {self.claim.below:g}")
        return " and ".join(parts)


def judge(experiment: Experiment, data: dict[str, Any]) -> list[Verdict]:
    """A verdict for each claim, of the data alone; one seed of what is random decides nothing, nor do some of several.

    Raises:
        ValueError: a claim that names no measure, or arguments that it does not take.
    """
    owner = training_of(experiment)
    several = owner.training is not None or owner.initialization is not None
    seeds = data.get("seeds", ()) if several else ()
    return [judge_claim(claim, data, experiment.id, several=several, seeds=seeds) for claim in experiment.claims]


def judge_claim(
    claim: Claim, data: dict[str, Any], source: str, *, several: bool = False, seeds: Sequence[int] = ()
) -> Verdict:
    """Held where every seed is within the bound, did not hold where the median is not, else not decided.

    Not decided either: one seed alone of what is random, a seed without a value, data without what is measured. A NaN
    of a theorem is out of the bound, and so is the median with it; of what is random it is no value.

    Args:
        claim: with its measure and bound.
        data: of the experiment.
        source: the experiment's name, for errors.
        several: of what is random, not decided by one seed alone.
        seeds: not decided where one of these has no value.
    """
    check_measure(claim, source)
    try:
        values = MEASURES[claim.measure](data, **claim.args)
    except Missing as missing:
        return Verdict(claim, "not decided", {}, str(missing))
    except KeyError as error:  # data of before this was measured
        return Verdict(claim, "not decided", {}, f"the data have no {error.args[0]}")
    wanted = dict.fromkeys([*seeds, *values])
    if several:
        values = {seed: value for seed, value in values.items() if not math.isnan(value)}
    if not values:
        return Verdict(claim, "not decided", {}, "no seed has a value")
    if lacking := [str(seed) for seed in wanted if seed not in values]:
        return Verdict(claim, "not decided", values, f"no value of seed {', '.join(lacking)}")
    inside = [within(claim, value) for value in values.values()]
    if several and len(inside) == 1:
        return Verdict(claim, "not decided", values, f"one seed alone, {'within' if inside[0] else 'out of'} the bound")
    if all(inside):
        return Verdict(claim, "held", values)
    if within(claim, median(values)):
        return Verdict(
            claim, "not decided", values, f"{inside.count(False)} of {len(inside)} seeds are out of the bound"
        )
    return Verdict(claim, "did not hold", values)


def median(values: Mapping[int, float]) -> float:
    """Over seeds; NaN where one of them is, wherever it stands."""
    return float(np.median(list(values.values())))


def check_measure(claim: Claim, source: str) -> None:
    """ValueError where a claim names no measure."""
    if claim.measure not in MEASURES:
        raise ValueError(f"{source}: unknown measure {claim.measure!r}; there are: {', '.join(MEASURES)}")


def within(claim: Claim, value: float) -> bool:
    """Whether a value is within the claim's bound; NaN never is."""
    above = claim.above is None or value > claim.above
    below = claim.below is None or value < claim.below
    return above and below
