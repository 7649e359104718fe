"""Many runs: one after the other in this process, or on Ray; what is finished is not trained again."""

from collections.abc import Callable, Mapping
from pathlib import Path

from condzoo.training.attempts import RunOptions, attempt, finished_run
from condzoo.training.events import Message, OnEvent
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
        Stopped: on a signal, also one that comes between two runs; the same call goes on.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, must be one of: {', '.join(ENGINES)}")
    options = RunOptions(max_steps, device, data_root, on_event)
    if engine == "local":
        return run_all_here(planned, Path(out), options)
    ended = finished_among(planned, Path(out), max_steps)
    if missing := {name: recipe for name, recipe in planned.items() if name not in ended}:
        from condzoo.training.ray_engine import Resources, run_all_on_ray

        ended |= run_all_on_ray(missing, Path(out), options, Resources(gpus_per_run, cpus_per_run))
    return [ended[name] for name in planned]


def finished_among(planned: Mapping[str, Recipe], out: Path, max_steps: int | None = None) -> dict[str, Run]:
    """Folder name -> run of those of which nothing is left to do."""
    runs = ((name, finished_run(recipe, out / name, max_steps)) for name, recipe in planned.items())
    return {name: run for name, run in runs if run is not None}


def run_all_here(planned: Mapping[str, Recipe], out: Path, options: RunOptions, one: OneRun = attempt) -> list[Run]:
    """Run what is missing in this process, one after the other, by `one`.

    Raises:
        Stopped: on a signal, also one that comes between two runs.
    """
    runs = finished_among(planned, out, options.max_steps)
    notify = options.on_event or (lambda event: None)
    with stop_signals() as request:
        for number, (name, recipe) in enumerate(planned.items(), start=1):
            if name in runs:
                continue
            if request.asked:
                raise Stopped(f"stopped by {request.asked} between two runs; run the same command to go on")
            if len(planned) > 1:
                notify(Message(f"[{number}/{len(planned)}] {name}"))
            runs[name] = one(recipe, out / name, options)
    return [runs[name] for name in planned]
