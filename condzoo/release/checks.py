"""Which runs are released: refused where anything about them is in doubt."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from condzoo.catalog import read_catalog
from condzoo.checkpoints.folder import RECIPE
from condzoo.checkpoints.loading import FEW_IMAGES
from condzoo.release.records import RULE
from condzoo.training import Recipe, Run, evaluate_run, load_recipe, load_run
from condzoo.training.environment import device_name, processor
from condzoo.training.outcome import last_epoch
from condzoo.training.run_directory import ENVIRONMENT, SUMMARY, read_json, read_summary
from condzoo.training.run_directory import METRICS as STEPS
from condzoo.training.runs import is_complete, runs_within

OTHER_DEVICE = 0.002  # share of the images that the arithmetic of another device or CPU may decide otherwise
# of the test loss, which other weights move though they classify every image alike; small ones by at least so much
SAME_LOSS, OTHER_LOSS, SMALL_LOSS = 1e-3, 0.05, 1e-4


class Ended(BaseModel):
    """What a release takes of the summary.json of any run."""

    status: str
    seed: int
    steps: int
    epochs: float
    seconds: float
    precision: str


class Done(Ended):
    """And of one that did not diverge."""

    parameters: int
    device: str
    finished: str
    test_error: float
    test_correct: int
    test_images: int
    test_loss: float | None = None


class Source(BaseModel):
    """The state of the repository that a training was run from; `error`: why git did not tell it."""

    commit: str | None
    changed: bool | None
    error: str | None = None


class Part(BaseModel):
    """What it takes of an entry of environment.json: one for each time that the run went on."""

    processor: str
    threads: int
    device: str
    packages: dict[str, str | None]
    source: Source | None


PARTS = TypeAdapter(Annotated[list[Part], Field(min_length=1)])


def checked_run(paths: Sequence[Path]) -> Run:
    """The run with the lowest seed, every run being finished and of one recipe that a name rebuilds."""
    if not paths:
        raise ValueError("no run was given; give at least one run directory")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"a run was given twice: {', '.join(map(str, paths))}; a seed counts once")
    recipes = {path: read_finished(path) for path in paths}
    check_same_recipe(recipes)
    run = load_run(min(recipes, key=lambda path: recipes[path].seed))
    check_model(run.recipe)
    for path, recipe in recipes.items():
        check_one_run(recipe, path)
    return run


def read_finished(path: Path) -> Recipe:
    """The recipe of a run that came to its end, from source that was committed.

    Raises:
        FileNotFoundError: no finished run.
        ValueError: stopped early, or the source had uncommitted changes.
    """
    if runs := runs_within(path):
        named = " ".join(str(path / run) for run in runs)
        raise FileNotFoundError(f"{path} is a folder of several runs; name each of them: {named}")
    for name in (RECIPE, SUMMARY, ENVIRONMENT):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no finished run: it has no {name}; finish it by `condzoo train`")
    recipe, summary = load_recipe(path / RECIPE), read_summary(path)
    if recipe.eval_every == 0:
        raise ValueError(f"{path} was never evaluated (eval_every = 0), and a release says how well it does")
    parts = checked_parts(path, summary)
    if summary["status"] == "done" and not is_complete(recipe, summary):
        length = f"{recipe.iterations} steps" if recipe.iterations else f"{recipe.epochs} epochs"
        raise ValueError(
            f"{path} was stopped after {summary['epochs']:g} epochs ({summary['steps']} steps) of {length}; "
            "the same `condzoo train` without --max-steps goes on"
        )
    for part in parts:
        source = part.source
        if source and source.error:
            raise ValueError(
                f"{path} was trained from a clone whose state git did not tell ({source.error}): nobody could say "
                "from which source; mend that, and train it again"
            )
        if source and source.changed:
            raise ValueError(
                f"{path} was trained from source with uncommitted changes (on {str(source.commit)[:12]}): nobody could "
                "train it again; commit, and train it again"
            )
    return recipe


def checked_parts(path: Path, summary: dict[str, Any]) -> list[Part]:
    """What environment.json says of each part of a run; ValueError where it, or the summary, is none of a training."""
    name = SUMMARY
    try:
        (Done if summary["status"] == "done" else Ended).model_validate(summary)
        name = ENVIRONMENT
        return PARTS.validate_python(read_json(path / ENVIRONMENT))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise ValueError(f"{path / name} is not what a training writes: {place}: {first['msg']}") from error


def check_one_run(recipe: Recipe, path: Path) -> None:
    """ValueError where the summary is of another run than the recipe, or the lines of its epochs, beside it."""
    summary = read_summary(path)
    for field, own in (("seed", recipe.seed), ("model", recipe.model.name), ("data", recipe.data.name)):
        if summary.get(field, own) != own:
            raise ValueError(f"{path}: {SUMMARY} has {field} {summary[field]}, {RECIPE} {own}: they are not of one run")
    taken = last_epoch(path).get("step", summary["steps"])
    if summary["status"] == "done" and taken != summary["steps"]:
        raise ValueError(
            f"{path}: {SUMMARY} has {summary['steps']} steps, the last line of {STEPS} {taken}: they are not of one run"
        )


def check_same_recipe(recipes: dict[Path, Recipe]) -> None:
    """ValueError unless the runs are of one recipe, each with a seed of its own."""
    (first, recipe), *others = recipes.items()
    for path, other in others:
        if other.model_copy(update={"seed": recipe.seed}) != recipe:
            raise ValueError(f"{path} and {first} differ in more than their seed; release them under two tags")
    seeds = [recipe.seed for recipe in recipes.values()]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two runs have the same seed: {sorted(seeds)}")


def check_every_seed(recipe: Recipe, paths: Sequence[Path]) -> None:
    """ValueError where a run beside those given is of the same recipe and came to its end with yet another seed."""
    given = {load_recipe(path / RECIPE).seed for path in paths}
    for folder in sorted({path.resolve().parent for path in paths}):
        for path in sorted(file.parent for file in folder.glob(f"*/{SUMMARY}")):
            other = ended_recipe(path)
            if other is None or other.seed in given:
                continue
            if other.model_copy(update={"seed": recipe.seed}) == recipe:
                raise ValueError(
                    f"{path} was trained by the same recipe with seed {other.seed}, and was not given: a release "
                    "lists every seed trained, not the best ones; give it too"
                )


def ended_recipe(path: Path) -> Recipe | None:
    """The recipe of a run that came to its end, by diverging too; None for one that did not, or what is no run."""
    try:
        recipe, summary = load_recipe(path / RECIPE), read_json(path / SUMMARY)
        return recipe if summary["status"] == "diverged" or is_complete(recipe, summary) else None
    except (OSError, ValueError, KeyError, TypeError):  # whatever else lies beside the runs
        return None


def check_model(recipe: Recipe) -> None:
    """ValueError for a network that its name alone does not rebuild."""
    name, args = recipe.model.name, recipe.model.args
    if name not in read_catalog()[0]:
        raise ValueError(f"{name} is not one of condzoo's registered models; only those are released by name")
    if args:
        raise ValueError(f"model.args = {args}: a released model is what its name builds; leave them out")
    if recipe.freeze:
        raise ValueError(f"freeze = {recipe.freeze}: part of the network kept its random weights; not released")


def check_evaluations(run: Run, paths: Sequence[Path], data_root: str | Path | None) -> None:
    """`check_evaluation` of the run that is released, and of each other one that has a result."""
    check_evaluation(run, data_root)
    for other in (load_run(path) for path in paths if path != run.path):
        if other.summary["status"] == "done":
            check_evaluation(other, data_root)


def check_evaluation(run: Run, data_root: str | Path | None) -> None:
    """Check that the run ended well and that evaluating it again gives its result.

    To the last image on the GPU, or the CPU and number of threads, that it ran on; where only another is here, to
    `OTHER_DEVICE` of them, and `FEW_IMAGES` of few. The loss, to `SAME_LOSS` or `OTHER_LOSS` of it.

    Raises:
        ValueError: it does not.
    """
    summary = run.summary
    if summary["status"] != "done":
        raise ValueError(f"{run.path} {summary['status']}; its weights are not released ({RULE})")
    kind = str(summary["device"]).partition(":")[0]
    here = kind == "cpu" or torch.cuda.is_available()
    # of other weights than the summary's: what they come to says more than that they are others
    again = evaluate_run(run.path, data_root=data_root, device=kind if here else "cpu", checked=False)
    same = here and same_arithmetic(read_json(run.path / ENVIRONMENT)[-1], kind)
    allowed = 0 if same else max(FEW_IMAGES, OTHER_DEVICE * again.total)
    if again.total != summary["test_images"] or abs(again.correct - summary["test_correct"]) > allowed:
        raise ValueError(
            f"{run.path} recorded {summary['test_correct']} of {summary['test_images']} test images right, "
            f"evaluating it again gives {again.correct} of {again.total}: the weights, the data or the code changed"
        )
    recorded = summary.get("test_loss")  # null where it was not finite
    bound = SAME_LOSS if same else OTHER_LOSS
    if recorded is not None and not math.isclose(again.loss, recorded, rel_tol=bound, abs_tol=SMALL_LOSS):
        raise ValueError(
            f"{run.path} recorded a test loss of {recorded:.6g}, evaluating it again gives {again.loss:.6g}: the "
            "weights, the data or the code changed"
        )
    error = 1 - summary["test_correct"] / summary["test_images"]
    if not math.isclose(summary["test_error"], error, abs_tol=1e-9):
        raise ValueError(f"{run.path} recorded a test error of {summary['test_error']}; its right answers make {error}")


def same_arithmetic(environment: dict[str, Any], kind: str) -> bool:
    """Whether this machine, in one process, adds up as what a run's environment.json describes."""
    if environment.get("processes", 1) != 1:  # each had a part of every batch
        return False
    if kind == "cpu":
        return (environment["processor"], environment["threads"]) == (processor(), torch.get_num_threads())
    return bool(environment["device"] == device_name(torch.device(kind)))
