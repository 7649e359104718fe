"""`train`: a recipe from its first step to its last, in the order things happen."""

import time
from pathlib import Path

import torch

from condzoo.probe import Probe
from condzoo.training.events import EpochDone, Finished, OnEvent, Started, StepDone
from condzoo.training.outcome import end_diverged, finish, finished_at, record_divergence
from condzoo.training.precision import resolve_device
from condzoo.training.preparation import Training, prepare, training_steps
from condzoo.training.progress import Progress, capture, go_on
from condzoo.training.recipe import check_recipe, load_recipe, parse_recipe, recipe_tables
from condzoo.training.reports import last_layer, opened_probe, record_epoch, record_step
from condzoo.training.resume import save_checkpoint
from condzoo.training.run_directory import CHECKPOINTS, SUMMARY, claimed, read_json
from condzoo.training.runs import Run, default_run_directory
from condzoo.training.schema import Recipe
from condzoo.training.signals import Stopped, StopRequest, stop_signals
from condzoo.training.steps import NonFinite, StepResult, take_step


def train(
    recipe: Recipe | str | Path,
    *,
    out: str | Path | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    max_steps: int | None = None,
    data_root: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> Run:
    """Train a recipe to its end; a run that was stopped or killed goes on where its last checkpoint is.

    On one CPU process the weights, the metrics and the conditioning records are bitwise a function of
    the recipe (thread count and hardware as they are), whether the run was interrupted or not.

    Args:
        recipe: from `load_recipe`, or what it takes.
        out: the run directory; default: `default_run_directory(recipe)`.
        seed: instead of the recipe's.
        device: "cpu", "cuda", "cuda:1" ...; default: a GPU where there is one.
        max_steps: end after this many optimizer steps; the schedule stays that of the whole run. A later
            call without it goes on.
        data_root: instead of the recipe's data.root; not part of the recipe.
        on_event: called with what happens, see `condzoo.training.events`.

    Returns:
        The run, evaluated over every test image after the last step.

    Raises:
        RecipeError, RunDirectoryError, CheckpointError, FileNotFoundError: before anything is trained.
        Stopped: SIGTERM or Ctrl-C; the state is saved, the same call goes on.
        Diverged: a loss or gradient that is not finite, unless on_divergence = "record".
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    if seed is not None:
        recipe = parse_recipe({**recipe_tables(recipe), "seed": seed})
    check_recipe(recipe)
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    path = Path(out) if out is not None else default_run_directory(recipe)
    notify = on_event or (lambda event: None)
    with (
        claimed(path, recipe),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        stop_signals() as request,
    ):
        if (path / SUMMARY).exists() and (summary := read_json(path / SUMMARY))["status"] == "diverged":
            return end_diverged(path, recipe, summary)
        training = prepare(recipe, resolve_device(device), data_root)
        progress = go_on(training, path, notify)
        last = min(training.total_steps, max_steps or training.total_steps)
        if finished_at(path, progress.step) and progress.step >= last:
            return Run(path, recipe, read_json(path / SUMMARY))
        notify(started(training, progress, path, last))
        try:
            fit(training, progress, path, last, request, notify)
        except NonFinite as fault:
            summary = record_divergence(training, progress, path, fault)
            notify(Finished(summary))
            return end_diverged(path, recipe, summary)
        summary = finish(training, progress, path)
        notify(Finished(summary))
        return Run(path, recipe, summary)


def started(training: Training, progress: Progress, path: Path, last: int) -> Started:
    """The event that opens a run."""
    return Started(
        path=path,
        recipe=training.recipe,
        device=str(training.numerics.device),
        precision=training.numerics.precision,
        start_step=progress.step,
        last_step=last,
        steps_per_epoch=training.steps_per_epoch,
        total_steps=training.total_steps,
        parameters=sum(p.numel() for p in training.model.parameters()),
    )


def fit(training: Training, progress: Progress, path: Path, last: int, request: StopRequest, notify: OnEvent) -> None:
    """Take every step up to `last`; measure, record and save on the way.

    Raises:
        NonFinite: see `take_step`.
        Stopped: a signal asked for it, and the state is saved.
    """
    per_epoch = training.steps_per_epoch
    save_steps = max(1, round(training.recipe.save_every * per_epoch))
    with opened_probe(training, path, progress.step) as probe:
        began = time.perf_counter()
        for batch in training_steps(training, progress.step, last):
            result = take_step(training, batch, probe)
            progress.add(result, time.perf_counter() - began)
            report_step(training, progress, path, result, probe, notify)
            if progress.step % per_epoch == 0:
                record = record_epoch(training, progress, path, result.lr)
                notify(EpochDone(record["epoch"], record))
                progress.end_epoch()
            if progress.step % save_steps == 0 or progress.step == last or request.asked:
                save_checkpoint(path / CHECKPOINTS, capture(training, progress, path))
            if request.asked and progress.step < last:
                raise Stopped(f"stopped by {request.asked} at step {progress.step}; run the same command to go on")
            began = time.perf_counter()


def report_step(
    training: Training, progress: Progress, path: Path, result: StepResult, probe: Probe | None, notify: OnEvent
) -> None:
    """The step's line in metrics.jsonl, every log_every steps, and its event.

    Reading numbers back from a GPU stops it, so there the event comes with the line.
    """
    step = progress.step - 1
    due = step % training.recipe.log_every == 0
    epoch = step // training.steps_per_epoch
    if due:
        record_step(path, step, epoch, result)
    if due or training.numerics.device.type == "cpu":
        speed, measured = progress.images_per_second, last_layer(probe)
        notify(StepDone(step, epoch, progress.loss, progress.accuracy, result.lr, speed, measured))
