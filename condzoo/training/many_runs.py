"""Many runs: one after the other in this process, or on Ray; what is finished is not trained again."""

import contextlib
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from condzoo.probe.files import expanded
from condzoo.training.attempts import RunOptions, attempt, finished_run
from condzoo.training.distributed import ALONE, among_others, join, launched
from condzoo.training.events import Message, OnEvent
from condzoo.training.loop import ignore
from condzoo.training.meeting import signals_noted
from condzoo.training.run_directory import RECIPE, RunDirectoryError
from condzoo.training.runs import Run
from condzoo.training.schema import Recipe
from condzoo.training.signals import Stopped, stop_signals

ENGINES = ("local", "ray")
OneRun = Callable[[Recipe, Path, RunOptions], Run]


def run_all(
    planned: Mapping[str, Recipe],
    out: str | Path,
    *,
    engine: str = "local",
    max_steps: int | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    on_event: OnEvent | None = None,
    gpus_per_run: float | None = None,
    cpus_per_run: float = 1,
) -> list[Run]:
    """Train each recipe in its folder under `out`, whatever becomes of the others; finished ones are left alone.

    Args:
        planned: folder name -> recipe.
        out: the folder of the runs.
        engine: "local": here, one after the other; "ray": see `condzoo.training.ray_engine`.
        max_steps, device, data_root, on_event: as for `train`.
        gpus_per_run, cpus_per_run: what Ray sets apart for a run; the local engine has no use for them.

    Returns:
        The runs in the order planned. A diverged run is among them with summary["status"] "diverged", one
        that failed otherwise with "failed" and its error.

    Raises:
        ValueError: an engine that there is not.
        RunDirectoryError: `out` is the directory of one run.
        Stopped: on a signal, also one that comes between two runs; the same call goes on.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, must be one of: {', '.join(ENGINES)}")
    options, folder = RunOptions(max_steps, device, data_root, on_event), expanded(out)
    if engine == "local":
        return run_all_here(planned, folder, options)
    ended = finished_among(planned, unclaimed(folder), max_steps)
    if missing := {name: recipe for name, recipe in planned.items() if name not in ended}:
        from condzoo.training.ray_engine import Resources, run_all_on_ray

        ended |= run_all_on_ray(missing, folder, options, Resources(gpus_per_run, cpus_per_run))
        ended |= finished_elsewhere(planned, ended, folder, max_steps)
    return [ended[name] for name in planned]


def finished_among(planned: Mapping[str, Recipe], out: Path, max_steps: int | None = None) -> dict[str, Run]:
    """Folder name -> run of those of which nothing is left to do."""
    runs = ((name, finished_run(recipe, out / name, max_steps)) for name, recipe in planned.items())
    return {name: run for name, run in runs if run is not None}


def finished_elsewhere(
    planned: Mapping[str, Recipe], ended: Mapping[str, Run], out: Path, max_steps: int | None = None
) -> dict[str, Run]:
    """Of the runs that failed here those that another call has finished since: it had them in use."""
    failed = [name for name, run in ended.items() if run.summary["status"] == "failed"]
    return finished_among({name: planned[name] for name in failed}, out, max_steps)


def unclaimed(out: Path) -> Path:
    """The folder of many runs, seen to be none of a single one, whose summary.json theirs would replace, and no file.

    Raises:
        RunDirectoryError: it is one of these.
    """
    if file := next((place for place in (out, *out.parents) if place.exists() and not place.is_dir()), None):
        raise RunDirectoryError(f"{file} is a file; --out must be a folder, or not there yet: use another one")
    if (out / RECIPE).is_file():
        raise RunDirectoryError(f"{out} is the directory of one run; several need a folder of their own: another --out")
    return out


def run_all_here(planned: Mapping[str, Recipe], out: Path, options: RunOptions, one: OneRun = attempt) -> list[Run]:
    """Run what is missing here, one after the other, by `one`; several processes take part in each run together.

    Raises:
        RunDirectoryError: `out` is the directory of one run.
        Stopped: on a signal, also one that comes between two runs.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(signals_noted())
        ranks = join(options.device)[0] if among_others() else ALONE
        request = held.enter_context(stop_signals(patient=launched()))
        runs = ranks.first_does(lambda: finished_among(planned, unclaimed(out), options.max_steps))
        notify = options.on_event if options.on_event is not None and ranks.first else ignore
        options = replace(options, on_event=notify)
        for number, (name, recipe) in enumerate(planned.items(), start=1):
            if name in runs:
                continue
            if stop := ranks.largest(request.number):
                signal_name = signal.Signals(stop).name
                raise Stopped(f"stopped by {signal_name} between two runs; run the same command to go on")
            if len(planned) > 1:
                notify(Message(f"[{number}/{len(planned)}] {name}"))
            runs[name] = one(recipe, out / name, options)
    runs |= ranks.first_does(lambda: finished_elsewhere(planned, runs, out, options.max_steps))
    return [runs[name] for name in planned]
