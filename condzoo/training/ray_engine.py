"""Many runs on Ray: a task each, placed by the GPUs and CPUs it needs, on this machine or a cluster's.

Ray is an optional dependency (`pip install condzoo[ray]`). Every machine needs condzoo, the data under the same
root, and the folder of the runs (a file system they share).
"""

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from condzoo.data.sources import DATA_ROOT_VARIABLE
from condzoo.probe.files import expanded
from condzoo.training.attempts import RunOptions, attempt, failed
from condzoo.training.events import Message, Notice
from condzoo.training.recipe import parse_recipe, recipe_tables
from condzoo.training.run_directory import RECIPE
from condzoo.training.runs import Run
from condzoo.training.schema import Recipe
from condzoo.training.signals import Stopped, stop_signals

RETRIES = 3  # of a run whose process or machine was lost; it goes on from its last checkpoint
SECONDS_BETWEEN_LOOKS = 0.5  # at whether a signal came
DEVICES = (None, "cpu", "cuda")  # which GPU is Ray's to say


@dataclass(frozen=True)
class Resources:
    """What one run takes of the cluster. GPUs None: one where there are any; a fraction lets runs share one."""

    gpus: float | None = None
    cpus: float = 1  # Ray also sets the threads of a run by it, where OMP_NUM_THREADS does not


def run_all_on_ray(
    planned: Mapping[str, Recipe], out: Path, options: RunOptions, resources: Resources
) -> dict[str, Run]:
    """Train each recipe in its folder under `out`, as many at a time as the cluster has room for.

    Args:
        planned: folder name -> recipe.
        out: the folder of the runs, as the machines of the cluster see it.
        options: `device` is None, "cpu" or "cuda"; `on_event` gets a `Message` as each run ends, a `Notice`
            where it failed.
        resources: of one run.

    Returns:
        Folder name -> run. One that diverged, failed, or whose process was lost more than `RETRIES` times is
        among them, and the others went on.

    Raises:
        ValueError: Ray is not installed; a device that is not Ray's to choose; no machine that a run fits on.
        Stopped: SIGTERM or Ctrl-C; every run saved its state, the same call goes on.
    """
    if options.device not in DEVICES:
        got = str(options.device)
        raise ValueError(f"device: got {got!r}, must be cpu or cuda on Ray, which chooses the GPU of each run")
    ray = connected()
    gpus = default_gpus(ray, options.device) if resources.gpus is None else resources.gpus
    check_room(ray, gpus, resources.cpus)
    notify = options.on_event or (lambda event: None)
    notify(Message(f"{len(planned)} runs on Ray, {gpus:g} GPUs and {resources.cpus:g} CPUs each, into {out}"))
    task = ray.remote(remote_attempt).options(num_gpus=gpus, num_cpus=resources.cpus, max_retries=RETRIES)

    def submit(name: str) -> Any:
        root = absolute_data_root(planned[name], options.data_root)
        own = replace(options, data_root=root, on_event=None)
        return task.remote(recipe_tables(planned[name]), out.resolve() / name, own, Path.cwd(), data_variable())

    ended: dict[str, Run] = {}
    with stop_signals() as request:  # after ray.init, which sets handlers of its own
        pending = {submit(name): name for name in planned}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=SECONDS_BETWEEN_LOOKS)
            if request.asked:
                stop_all(ray, pending)
                raise Stopped(f"stopped by {request.asked}, the runs on Ray with it; run the same command to go on")
            for reference in ready:
                name = pending.pop(reference)
                run = outcome(ray, reference, planned[name], out / name)
                if run is None:  # its machine was asked for back, not the sweep
                    pending[submit(name)] = name
                    continue
                ended[name] = run
                event = Notice if run.summary["status"] == "failed" else Message
                notify(event(f"[{len(ended)}/{len(planned)}] {name}: {outcome_text(run.summary)}"))
    return ended


def remote_attempt(
    tables: dict[str, Any], path: Path, options: RunOptions, here: Path, variable: str | None = None
) -> dict[str, Any]:
    """What a Ray worker does: one run; returns its summary, or {"status": "stopped"} after a signal.

    It works in the folder `here` of the process that asked for it, where its machine has that: relative paths in
    a recipe (data.dataset) mean there what they mean here. `variable` is that process's CONDZOO_DATA.
    """
    if variable is not None:
        os.environ[DATA_ROOT_VARIABLE] = variable
    with contextlib.chdir(here) if here.is_dir() else contextlib.nullcontext():
        try:
            return attempt(parse_recipe(tables), path, options).summary
        except Stopped:
            return {"status": "stopped"}


def connected() -> Any:
    """The module `ray`, connected: to RAY_ADDRESS or a cluster of this machine, else to one started here.

    Raises:
        ValueError: it is not installed.
        OSError: no cluster is where RAY_ADDRESS says, or none could be started.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("ray is not installed: pip install 'condzoo[ray]', or use the engine 'local'") from error
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # a plain one, where a busy machine is too slow for Ray's own limits
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(f"Ray was not reached or started: {first}; try again, or use the engine 'local'") from error
    return ray


def default_gpus(ray: Any, device: object) -> float:
    """One where the cluster has any and the CPU was not asked for."""
    return 1.0 if device != "cpu" and ray.cluster_resources().get("GPU") else 0.0


def check_room(ray: Any, gpus: float, cpus: float) -> None:
    """See that a machine of the cluster is large enough for a run: Ray would wait for one for ever.

    Raises:
        ValueError: none is.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(machine.get("GPU", 0) >= gpus and machine.get("CPU", 0) >= cpus for machine in machines):
        return
    sizes = ", ".join(sorted({f"{m.get('GPU', 0):g} GPUs and {m.get('CPU', 0):g} CPUs" for m in machines}))
    raise ValueError(
        f"a run needs {gpus:g} GPUs and {cpus:g} CPUs, and no machine of the Ray cluster has them ({sizes}); "
        "ask for fewer by --gpus-per-run and --cpus-per-run"
    )


def absolute_data_root(recipe: Recipe, data_root: str | Path | None) -> str | None:
    """The data root that the caller or the recipe names, for workers, which have another working directory."""
    root = data_root or recipe.data.root
    return str(expanded(root).resolve()) if root else None


def data_variable() -> str | None:
    """CONDZOO_DATA for workers, which have another environment; no root, beside which nothing else would be looked at.

    So where an image set is not there it is looked for in the user's cache, as in this process.
    """
    root = os.environ.get(DATA_ROOT_VARIABLE)
    return str(expanded(root).resolve()) if root else None


def outcome(ray: Any, reference: Any, recipe: Recipe, path: Path) -> Run | None:
    """The run a task ended as; None where it was stopped. Failed, too, where its process or its files were lost."""
    try:
        summary = ray.get(reference)
    except ray.exceptions.RayError as error:  # after its retries, or what nobody foresaw
        return failed(recipe, path, str(error).strip().splitlines()[-1])
    if summary["status"] == "stopped":
        return None
    if summary["status"] != "failed" and not (path / RECIPE).is_file():
        return failed(recipe, path, f"{path} is not a folder that all machines share; use another --out")
    return Run(path, recipe, summary)


def outcome_text(summary: Mapping[str, Any]) -> str:
    """What became of a run, in a few words."""
    if summary["status"] == "done":
        return f"test error {summary['test_error']:.2%}" if "test_error" in summary else "done, not evaluated"
    return f"failed: {summary['error']}" if summary["status"] == "failed" else str(summary["status"])


def stop_all(ray: Any, pending: Mapping[Any, str]) -> None:
    """Interrupt every task, which saves and ends; those that wait are taken back."""
    for reference in pending:
        ray.cancel(reference, force=False)
    ray.wait(list(pending), num_returns=len(pending), timeout=None)
