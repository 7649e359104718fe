"""One run among many: what became of it, whatever that was, and whether it is still to be done."""

from dataclasses import dataclass
from pathlib import Path

import torch

from condzoo.training.distributed import in_step
from condzoo.training.events import Notice, OnEvent
from condzoo.training.loop import train
from condzoo.training.recipe import RecipeError, load_recipe
from condzoo.training.resume import checkpoint_files
from condzoo.training.run_directory import CHECKPOINTS, MODEL, RECIPE, SUMMARY, RunDirectoryError, begun, read_summary
from condzoo.training.runs import Diverged, Run, is_complete
from condzoo.training.schema import Recipe
from condzoo.training.signals import Stopped


@dataclass(frozen=True)
class RunOptions:
    """What runs share beside their recipes; as for `train`."""

    max_steps: int | None = None
    device: str | torch.device | None = None
    data_root: str | Path | None = None
    on_event: OnEvent | None = None


def attempt(recipe: Recipe, path: Path, options: RunOptions) -> Run:
    """As `train_to_any_end`; a run that fails is returned, too, with its summary's `status` "failed" and why.

    Raises:
        Stopped: on a signal; nothing is wrong with the run.
        Exception: what one of several processes met alone: the others still wait for it in this run.
    """
    try:
        return train_to_any_end(recipe, path, options)
    except Stopped:
        raise
    except Exception as error:  # whatever a network's own code raises must not end the others
        if not in_step(error):
            raise
        why = str(error) if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{error!r}"
        if options.on_event is not None:
            options.on_event(Notice(f"{path} failed: {why}"))
        return failed(recipe, path, why)


def train_to_any_end(recipe: Recipe, path: Path, options: RunOptions) -> Run:
    """Train a recipe in `path`; a run that diverges is returned with its summary's `status` so.

    Raises:
        Exception: what `train` raises but for `Diverged`.
    """
    try:
        return train(
            recipe,
            out=path,
            max_steps=options.max_steps,
            device=options.device,
            data_root=options.data_root,
            on_event=options.on_event,
        )
    except Diverged as error:
        return Run(path, recipe, error.summary)


def failed(recipe: Recipe, path: Path, error: str) -> Run:
    """A run that came to nothing, and why."""
    return Run(path, recipe, {"status": "failed", "error": error, "seed": recipe.seed})


def state_of(recipe: Recipe, path: Path, max_steps: int | None = None) -> str:
    """What is known of a run before it is trained: "done", "diverged", "begun", "to do", or "blocked: " and by what."""
    run = finished_run(recipe, path, max_steps)
    if run is not None:
        return str(run.summary["status"])
    try:
        return "begun" if begun(path, recipe) else "to do"
    except (RunDirectoryError, RecipeError) as error:
        return f"blocked: {error}"


def finished_run(recipe: Recipe, path: Path, max_steps: int | None = None) -> Run | None:
    """The run in `path` where nothing of it is left to do, without reading any data; else None.

    A run of another recipe is no such run: `train` says what is wrong with it. Weights that are lost are to be written
    again from a checkpoint; where that is lost, too (a copy without large files), the numbers stand, and training
    again would cut off its records.
    """
    if not all((path / name).is_file() for name in (RECIPE, SUMMARY)):
        return None
    try:
        if load_recipe(path / RECIPE) != recipe:
            return None
        summary = read_summary(path)
    except (RecipeError, ValueError):
        return None
    if summary["status"] == "diverged":
        return Run(path, recipe, summary)
    lost = not (path / MODEL).is_file() and bool(checkpoint_files(path / CHECKPOINTS))
    if lost or not is_complete(recipe, summary, max_steps):
        return None
    return Run(path, recipe, summary)
