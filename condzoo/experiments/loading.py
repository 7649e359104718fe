"""Reading recipes/paper/<id>.toml, and the recipes of an experiment's runs."""

import copy
import difflib
import fnmatch
import itertools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from condzoo.experiments.schema import Experiment, RunSpec, Scale, Settings
from condzoo.training import Recipe
from condzoo.training.recipe import parse_recipe, set_field
from condzoo.training.recipe_files import EXPERIMENTS, recipe_folder

ORDER = ("prop", "thm", "cost", "fig", "table")


@dataclass(frozen=True)
class PlannedRun:
    """One training: the curve it belongs to, its place in the curve's grid, and its recipe."""

    label: str
    variant: dict[str, Any]
    recipe: Recipe


def experiment_ids() -> list[str]:
    """Every experiment, in the appendix's order: theory, figures, tables."""
    names = [path.stem for path in (recipe_folder() / EXPERIMENTS).glob("*.toml")]
    return sorted(names, key=lambda name: (next((i for i, o in enumerate(ORDER) if name.startswith(o)), 9), name))


def load_experiment(name: str) -> Experiment:
    """Read and check one experiment.

    Raises:
        ValueError: an unknown id (the closest is given), or a file with a fault (each with its field).
    """
    if name not in experiment_ids():
        padded = re.sub(r"(\d+)$", lambda number: number[1].zfill(2), name)  # fig5: fig05, not fig15
        close = difflib.get_close_matches(padded, experiment_ids(), n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(experiment_ids())}"
        raise ValueError(f"unknown experiment {name!r}; {hint}")
    path = recipe_folder() / EXPERIMENTS / f"{name}.toml"
    return parse_experiment({"id": name, **tomllib.loads(path.read_text(encoding="utf-8"))}, str(path))


def parse_experiment(given: dict[str, Any], source: str) -> Experiment:
    """A checked experiment from nested tables."""
    try:
        return Experiment.model_validate(given)
    except ValidationError as error:
        faults = [f"{source}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ValueError("\n".join(faults)) from error


def scale_of(experiment: Experiment, scale: str) -> Scale:
    """How much is run at a scale.

    Raises:
        ValueError: the experiment has no such scale.
    """
    if scale not in experiment.scales:
        raise ValueError(f"{experiment.id} has no scale {scale!r}; it has: {', '.join(experiment.scales)}")
    return experiment.scales[scale]  # type: ignore[index]


def settings_of(experiment: Experiment, scale: str) -> Settings | None:
    """What is measured at a scale where nothing is trained; None where something is.

    Raises:
        ValueError: the experiment has no such scale.
    """
    own = experiment.initialization or experiment.theory or experiment.growth
    return own and own.model_copy(update=scale_of(experiment, scale).settings)


def training_of(experiment: Experiment) -> Experiment:
    """The experiment whose runs this one shows: itself, or `training.runs_of`."""
    settings = experiment.training
    return load_experiment(settings.runs_of) if settings is not None and settings.runs_of else experiment


def planned_runs(
    experiment: Experiment,
    scale: str,
    seeds: Sequence[int] | None = None,
    data: dict[str, Any] | None = None,
    only: Sequence[str] | None = None,
) -> list[PlannedRun]:
    """Every training of an experiment at a scale: runs, their grids, the seeds fastest.

    Args:
        experiment: of kind training.
        scale: "paper" or "cpu".
        seeds: in place of the scale's.
        data: fields of every recipe's [data] in place of the experiment's, such as the folder of images.
        only: patterns (fnmatch) of the curves that are run, such as "*-20*"; default: those of the scale.

    Raises:
        ValueError: patterns that match no curve; the curves are named.
        RecipeError: a run that is no valid recipe; names the experiment and the run.
    """
    owner = training_of(experiment)
    assert owner.training is not None
    chosen, labels = scale_of(owner, scale), labels_run(experiment, scale, only)
    planned = []
    for spec in owner.training.runs:
        if spec.label not in labels:
            continue
        for variant in combinations(spec, chosen):
            for seed in seeds or chosen.seeds:
                tables = copy.deepcopy(owner.training.recipe)
                fields = {**spec.set, **fields_at(chosen, spec.label), **variant, "seed": seed}
                fields |= {f"data.{key}": value for key, value in (data or {}).items()}
                for path, value in fields.items():
                    set_field(tables, path, value)
                recipe = parse_recipe(tables, f"{owner.id}, {spec.label}")
                planned.append(PlannedRun(spec.label, variant, recipe))
    return planned


def fields_at(scale: Scale, label: str) -> dict[str, Any]:
    """What a scale changes in one curve's recipe: in all curves' first, then in those like the patterns."""
    fields = dict(scale.recipe)
    for pattern, own in scale.runs.items():
        if fnmatch.fnmatchcase(label, pattern):
            fields |= own
    return fields


def labels_run(experiment: Experiment, scale: str, only: Sequence[str] | None = None) -> list[str]:
    """The curves of an experiment at a scale, in their order.

    Raises:
        ValueError: `only` matches none of them; they are named.
    """
    owner = training_of(experiment)
    assert owner.training is not None
    assert experiment.training is not None
    drawn = [spec.label for spec in owner.training.runs if spec.label in (experiment.training.labels or [spec.label])]
    if only is None:
        kept = scale_of(owner, scale).only
        return drawn if kept is None else [label for label in drawn if label in kept]
    found = [label for label in drawn if any(fnmatch.fnmatchcase(label, pattern) for pattern in only)]
    if not found:
        raise ValueError(f"{experiment.id} has no run like {', '.join(map(repr, only))}; it has: {', '.join(drawn)}")
    return found


def combinations(spec: RunSpec, scale: Scale) -> list[dict[str, Any]]:
    """The points of a run's grid, each as {field: value}; one empty point where there is no grid."""
    grid = {field: scale.grid.get(field, values) for field, values in spec.grid.items()}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
