"""`train`: a recipe from its first step to its last, in the order things happen."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from condzoo.probe import Probe
from condzoo.probe.files import expanded
from condzoo.training.diagnosis import check_weights, diagnose
from condzoo.training.distributed import Ranks, join, launched
from condzoo.training.divergence import NonFinite
from condzoo.training.events import EpochDone, Event, Finished, Message, Notice, OnEvent, Started, StepDone
from condzoo.training.meeting import signals_noted
from condzoo.training.outcome import earlier_summary, end_diverged, finish, last_epoch, record_divergence
from condzoo.training.precision import usual_torch
from condzoo.training.preparation import Training, first_unreadable, join_gradients, prepare, training_steps
from condzoo.training.progress import Progress, capture, go_on
from condzoo.training.recipe import as_int, check_recipe, load_recipe, parse_recipe, recipe_tables
from condzoo.training.reports import last_layer, opened_probe, record_epoch, record_step
from condzoo.training.resume import save_checkpoint
from condzoo.training.run_directory import CHECKPOINTS, claimed
from condzoo.training.runs import Run, default_run_directory, is_complete
from condzoo.training.schema import Recipe
from condzoo.training.signals import Stopped, StopRequest, stop_signals
from condzoo.training.steps import StepResult, learning_rate_of, take_step

FIRST_WEIGHTS = 0.1  # share of an average that the first step's weights may have
CHECK_STEPS = 10  # between looks at what stays on a GPU: whether a step was bad, whether a process was asked to stop


@usual_torch()
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

    Started by torchrun, or in a process group of the caller's, the processes train together; the first one
    alone writes, and sees events.

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
        Diverged: a loss, gradient, running statistic or weight that is not finite, unless on_divergence = "record".
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    if seed is not None:
        recipe = parse_recipe({**recipe_tables(recipe), "seed": as_int(seed)})
    check_recipe(recipe)
    max_steps = as_int(max_steps)
    if max_steps is not None and not isinstance(max_steps, int):
        raise ValueError(f"max_steps must be a whole number, got {max_steps!r}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    path = expanded(out) if out is not None else default_run_directory(recipe)
    with contextlib.ExitStack() as held:
        held.enter_context(signals_noted())
        ranks, own_device = join(device)
        notify = on_event if on_event is not None and ranks.first else ignore
        request = held.enter_context(stop_signals(patient=launched()))
        ranks.first_does(lambda: held.enter_context(claimed(path, recipe)))
        held.enter_context(forked_random_numbers(own_device, ranks))
        earlier = ranks.first_does(lambda: earlier_summary(path))
        if earlier is not None and earlier["status"] == "diverged":
            return end_diverged(path, recipe, earlier)
        if earlier is not None and is_complete(recipe, earlier, max_steps):  # its data need not be here any more
            notify(Message(f"{path} was trained to step {earlier['steps']:,} before; nothing is left to train"))
            return Run(path, recipe, earlier)
        training = join_gradients(ranks.all_do(lambda: prepare(recipe, own_device, data_root, ranks)))
        last = min(training.total_steps, max_steps or training.total_steps)
        progress = go_on(training, path, notify)
        notify(started(training, progress, path, last))
        for text in doubts(recipe, last):
            notify(Notice(text))
        try:
            fit(training, progress, path, last, request, notify)
        except NonFinite as bad:
            ranks.all_do(lambda: first_unreadable(training))
            progress.rewind(bad.step)
            summary = record_divergence(training, progress, path, bad.fault or diagnose(training, bad.step), notify)
            notify(Finished(summary))
            return end_diverged(path, recipe, summary)
        summary = finish(training, progress, path, notify)
        notify(Finished(summary))
        return Run(path, recipe, summary)


def ignore(event: Event) -> None:
    """The on_event of a process that shows nothing."""


def forked_random_numbers(device: torch.device, ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """The caller's random numbers are left as they are; a process with a GPU of its own touches no other."""
    if ranks.world > 1:
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


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


def doubts(recipe: Recipe, last: int) -> Iterator[str]:
    """What makes the numbers of a run of `last` steps say something else than they seem to."""
    first = 0.0 if recipe.ema is None else recipe.ema ** (last - 1)
    if first > FIRST_WEIGHTS:
        yield (
            f"ema = {recipe.ema:g}: after {last} steps {first:.0%} of the average, which is what is evaluated, are the "
            "weights of the first step; a smaller ema or more steps make it an average of the last ones"
        )


def fit(training: Training, progress: Progress, path: Path, last: int, request: StopRequest, notify: OnEvent) -> None:
    """Take every step up to `last`; measure, record and save on the way.

    All processes of a run look at the same steps whether to go on.

    Raises:
        NonFinite: see `take_step` and `check_weights`.
        Stopped: a signal asked for it, and the state is saved.
    """
    per_epoch = training.steps_per_epoch
    save_steps = max(1, round(training.recipe.save_every * per_epoch))
    with opened_probe(training, path, progress.step) as probe:
        if progress.step % per_epoch == 0:
            if training.ranks.first_does(lambda: lacks_line(progress, path)):
                end_epoch(training, progress, path, last, request, notify)
            progress.end_epoch()
        began = time.perf_counter()
        for batch in training_steps(training, progress.step, last):
            result = take_step(training, batch, probe)
            taken = batch.step + 1
            saving = taken % save_steps == 0 or taken == last
            checking = saving or check_due(training, taken)
            if checking:
                training.guard.check()  # waits for what a GPU has yet to do, which is the steps' time, too
            progress.add(result, time.perf_counter() - began)
            report_step(training, progress, path, result, probe, notify)
            if checking:
                progress.unchecked.clear()
                if saving:
                    check_weights(training, taken)
                save_or_stop(training, progress, path, last, request, saving)
            if taken % per_epoch == 0:
                end_epoch(training, progress, path, last, request, notify)
                progress.end_epoch()
            began = time.perf_counter()


def save_or_stop(
    training: Training, progress: Progress, path: Path, last: int, request: StopRequest, saving: bool
) -> None:
    """Save where it is time to, or where a signal asks any process to stop; then stop.

    Raises:
        Stopped: a signal asked for it.
    """
    stop = training.ranks.largest(request.number)
    if saving or stop:
        training.ranks.first_does(lambda: save_checkpoint(path / CHECKPOINTS, capture(training, progress, path)))
    if stop and progress.step < last:
        name = signal.Signals(stop).name
        raise Stopped(f"stopped by {name} at step {progress.step}; run the same command to go on")


def end_epoch(
    training: Training, progress: Progress, path: Path, last: int, request: StopRequest, notify: OnEvent
) -> None:
    """Evaluate, and write the line of the epoch that has ended.

    It was saved before, where it is to be: evaluating may take longer than the sender of a signal waits. Where the
    run ends here it is saved again, with its line and the same tensors: a kill meanwhile damages no checkpoint.

    Raises:
        Stopped: a signal came in the evaluation.
    """
    record = record_epoch(training, progress, path, learning_rate_of(training, progress.step - 1))
    notify(EpochDone(record["epoch"], record))
    save_or_stop(training, progress, path, last, request, progress.step == last)


def lacks_line(progress: Progress, path: Path) -> bool:
    """Whether a run goes on from an epoch that had been saved, and not yet evaluated."""
    return progress.images > 0 and last_epoch(path).get("step") != progress.step


def check_due(training: Training, step: int) -> bool:
    """Whether to look, after `step` steps, if the run is sound and should go on: always, where looking is free."""
    logged = (step - 1) % training.recipe.log_every == 0
    return not training.guard.deferred or logged or step % CHECK_STEPS == 0 or step % training.steps_per_epoch == 0


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
        training.ranks.first_does(lambda: record_step(path, step, epoch, result))
    if not training.ranks.first:
        return
    if due or not training.guard.deferred:
        speed, measured = progress.images_per_second, last_layer(probe)
        notify(StepDone(step, epoch, progress.loss, progress.accuracy, result.lr, speed, measured))
