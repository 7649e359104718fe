"""The fields of recipes/paper/<id>.toml, strict: an unknown field or another type is an error.

What a training, an initialization, a theorem needs stands in a table of its own; an experiment has exactly one of
them, which makes its kind.
"""

import fnmatch
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scalar = str | int | float | bool
Bound = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A table: unknown fields, other types and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Claim(Section):
    """One statement of the paper as a measure of the data with a bound; every seed gives one value.

    Held: every seed is within the bound. Did not hold: the median is not. Not decided: only the median is, there is
    no value, a seed is without one, one seed alone has been run of what is random, or the measure needs what this scale
    does not run.
    """

    text: str = Field(description="the paper's statement, in its words or close to them")
    measure: str = Field(description="a function of condzoo.experiments.measures")
    args: dict[str, Any] = Field(default_factory=dict, description="its arguments")
    below: Bound | None = Field(None, description="holds below this")
    above: Bound | None = Field(None, description="holds above this")
    unit: str = Field("", description="of the value, in words")
    paper: str = Field("", description="the paper's own value, where it gives one")
    reason: str = Field(description="why this bound")
    after: bool = Field(False, description="written down after the data were seen, not before; the report marks it")

    @model_validator(mode="after")
    def _one_bound(self) -> "Claim":
        if self.below is None and self.above is None:
            raise ValueError("a claim needs a bound: below, above or both")
        return self


class Scale(Section):
    """How much of an experiment is run.

    `recipe` holds what differs from the experiment's own `training.recipe`, `runs` what differs besides in some of the
    runs; `only` keeps the runs of these labels.
    """

    minutes: float = Field(gt=0, description="how long it takes, about, on the hardware named")
    hardware: str = Field(description="which takes that long")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    reductions: list[str] = Field([], description="what is less than the paper's, in words")
    recipe: dict[str, Any] = Field(default_factory=dict, description="recipe fields by dotted path")
    runs: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="pattern (fnmatch) of labels -> recipe fields by dotted path"
    )
    grid: dict[str, list[Scalar]] = Field(default_factory=dict, description="in place of a run's own grid")
    only: list[str] | None = Field(None, description="labels of the runs at this scale; default: all")
    settings: dict[str, Any] = Field(default_factory=dict, description="in place of the kind's own settings")


class RunSpec(Section):
    """One curve: a label, and how its recipe differs from the common one.

    With a `grid` every combination is trained, and `choose` says by which the curve is taken.
    """

    label: str
    set: dict[str, Any] = Field(default_factory=dict, description="recipe fields by dotted path")
    grid: dict[str, list[Scalar]] = Field(default_factory=dict, description="recipe field -> values tried")
    choose: Literal["train_loss", "all"] = Field("train_loss", description="the lowest final one, or all are drawn")
    paper: str = Field("", description="the paper's own error, %, where it gives one")


class TrainingSettings(Section):
    """Trainings, and what is kept of their records.

    `runs_of` names an experiment whose runs these are, so that nothing is trained twice.
    """

    runs_of: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict, description="a recipe's tables")
    runs: list[RunSpec] = Field(default_factory=list)
    labels: list[str] | None = Field(None, description="with runs_of: which runs; default: all")
    quantities: list[str] = Field([], description="of the conditioning records, see condzoo.experiments.training")
    last_layer_only: bool = Field(False, description="keep the last layer's values alone")


class InitializationSettings(Section):
    """Exact curvature of networks at their initialization."""

    models: dict[str, str] = Field(description="label -> model")
    matrices: list[Literal["fisher", "grad_moment", "hessian"]] = Field(min_length=1)
    examples: int = Field(gt=1)
    p: list[float] = Field(description="fractions that kappa_p is kept for")
    init: str = Field("random", description="initializer")
    data: dict[str, Any] = Field(description="a recipe's [data]")


class TheorySettings(Section):
    """Random networks, scaled; the probe's numbers against what the statement says."""

    statement: Literal["theorem_1", "theorem_2", "proposition_1"]
    trials: int = Field(gt=0, description="networks a seed")


class GrowthSettings(Section):
    """Times of the exact matrix, its blocks and its Kronecker factors over N, L and d, one varied at a time."""

    base: dict[Literal["examples", "layers", "widths"], int] = Field(description="the sizes that are not varied")
    examples: list[int]
    layers: list[int]
    widths: list[int]
    repeats: int = Field(gt=0)


Settings = InitializationSettings | TheorySettings | GrowthSettings


class FigureSettings(Section):
    """How the data are drawn, see condzoo.experiments.figures."""

    kind: Literal[
        "layers", "curves", "errors", "last_layer", "units", "explosion", "initialization", "theory", "growth"
    ]
    quantities: list[str] = Field([], description="columns, for layers")
    columns: list[str] = Field([], description="curves: train_loss, train_error, test_error")
    epoch_images: int | None = Field(
        None, gt=0, description="training images an epoch: losses and errors are drawn by epoch, not by iteration"
    )


class Experiment(Section):
    """One figure or table."""

    id: str
    title: str
    setup: str = Field(description="the paper's setup, and what it leaves open")
    departs: str = Field("", description="choices where the paper is silent, departures from it, and why")
    figure: FigureSettings
    claims: list[Claim] = Field(min_length=1)
    remarks: dict[Literal["paper", "cpu"], str] = Field(
        default_factory=dict, description="after the run: a look into why a claim did not hold, by scale"
    )
    scales: dict[Literal["paper", "cpu"], Scale]
    training: TrainingSettings | None = None
    initialization: InitializationSettings | None = None
    theory: TheorySettings | None = None
    growth: GrowthSettings | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Experiment":
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"an experiment has exactly one of {', '.join(KINDS)}; this one has {kinds or 'none'}")
        return self

    @model_validator(mode="after")
    def _patterns_match(self) -> "Experiment":
        labels = [spec.label for spec in self.training.runs] if self.training is not None else []
        for name, scale in self.scales.items():
            for pattern in scale.runs:
                if not any(fnmatch.fnmatchcase(label, pattern) for label in labels):
                    raise ValueError(f"scales.{name}.runs: no run like {pattern!r}; there are: {', '.join(labels)}")
        return self

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


SCALES = ("cpu", "paper")
KINDS = ("training", "initialization", "theory", "growth")
