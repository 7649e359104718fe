"""Many runs on Ray: a task each, placed by the GPUs and CPUs it needs, on this machine or a cluster's.

Ray is an optional dependency (`pip install condzoo[ray]`). Every machine needs condzoo, the data under the same
root, and the folder of the runs (a file system they share).
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from condzoo.data.sources import DATA_ROOT_VARIABLE
from condzoo.training.attempts import attempt, failed
from condzoo.training.events import Notice, OnEvent
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
    """What one run takes of the cluster."""

    gpus: float
    cpus: float


def run_all_on_ray(
    planned: Mapping[str, Recipe],
    out: str | Path,
    *,
    max_steps: int | None = None,
    device: str | torch.device | None = None,
    data_root: str | Path | None = None,
    on_event: OnEvent | None = None,
    gpus_per_run: float | None = None,
    cpus_per_run: float = 1,
) -> dict[str, Run]:
    """Train each recipe in its folder under `out`, as many at a time as the cluster has room for.

    Args:
        planned, out, max_steps, data_root: as `run_all`; both paths as the machines of the cluster see them.
        device: None, "cpu" or "cuda".
        on_event: gets a `Notice` as each run ends.
        gpus_per_run: default: one where the cluster has any; a fraction lets runs share one.
        cpus_per_run: Ray also sets the threads of a run by it, where OMP_NUM_THREADS does not.

    Returns:
        Folder name -> run. One that diverged, failed, or whose process was lost more than `RETRIES` times is
        among them, and the others went on.

    Raises:
        ValueError: Ray is not installed; a device that is not Ray's to choose; no machine that a run fits on.
        Stopped: SIGTERM or Ctrl-C; every run saved its state, the same call goes on.
    """
    if device not in DEVICES:
        raise ValueError(f"device: got {str(device)!r}, must be cpu or cuda on Ray, which chooses the GPU of each run")
    ray = connected()
    gpus = gpus_per_run if gpus_per_run is not None else default_gpus(ray, device)
    room = checked_room(ray, Resources(gpus, cpus_per_run))
    notify = on_event or (lambda event: None)
    notify(Notice(f"{len(planned)} runs on Ray, {room.gpus:g} GPUs and {room.cpus:g} CPUs each, into {out}"))
    task = ray.remote(remote_attempt).options(num_gpus=room.gpus, num_cpus=room.cpus, max_retries=RETRIES)

    def submit(name: str) -> Any:
        root = absolute_data_root(planned[name], data_root)
        return task.remote(recipe_tables(planned[name]), str(Path(out).resolve() / name), max_steps, device, root)

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
                summary = outcome(ray, reference)
                if summary["status"] == "stopped":  # its machine was asked for back, not the sweep
                    pending[submit(name)] = name
                    continue
                ended[name] = Run(Path(out) / name, planned[name], summary)
                notify(Notice(f"{name}: {outcome_text(summary)} ({len(ended)} of {len(planned)} runs)"))
    return {name: visible(ended[name]) for name in planned}


def remote_attempt(
    tables: dict[str, Any], path: str, max_steps: int | None, device: str | None, data_root: str | None
) -> dict[str, Any]:
    """What a Ray worker does: one run; returns its summary, or {"status": "stopped"} after a signal."""
    try:
        recipe = parse_recipe(tables)
        return attempt(recipe, Path(path), max_steps=max_steps, device=device, data_root=data_root).summary
    except Stopped:
        return {"status": "stopped"}


def connected() -> Any:
    """The module `ray`, connected: to RAY_ADDRESS or a cluster of this machine, else to one started here.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("ray is not installed: pip install 'condzoo[ray]', or use the engine 'local'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    return ray


def default_gpus(ray: Any, device: object) -> float:
    """One where the cluster has any and the CPU was not asked for."""
    return 1.0 if device != "cpu" and ray.cluster_resources().get("GPU") else 0.0


def checked_room(ray: Any, wanted: Resources) -> Resources:
    """`wanted`, where a machine of the cluster is large enough: Ray would wait for one for ever.

    Raises:
        ValueError: none is.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(m.get("GPU", 0) >= wanted.gpus and m.get("CPU", 0) >= wanted.cpus for m in machines):
        return wanted
    sizes = ", ".join(sorted({f"{m.get('GPU', 0):g} GPUs and {m.get('CPU', 0):g} CPUs" for m in machines}))
    raise ValueError(
        f"a run needs {wanted.gpus:g} GPUs and {wanted.cpus:g} CPUs, and no machine of the Ray cluster has them "
        f"({sizes}); ask for fewer by --gpus-per-run and --cpus-per-run"
    )


def absolute_data_root(recipe: Recipe, data_root: str | Path | None) -> str | None:
    """The data root for workers, which have another working directory and environment than this process."""
    root = data_root or recipe.data.root or os.environ.get(DATA_ROOT_VARIABLE)
    return str(Path(root).expanduser().resolve()) if root else None


def outcome(ray: Any, reference: Any) -> dict[str, Any]:
    """The summary a task returned, or that of a failure: its process was lost, or an error nobody foresaw."""
    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except ray.exceptions.RayError as error:
        return {"status": "failed", "error": str(error).strip().splitlines()[-1]}


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


def visible(run: Run) -> Run:
    """The run, where its files can be seen from here; a failed one where another machine keeps them to itself."""
    if run.summary["status"] == "failed" or (run.path / RECIPE).is_file():
        return run
    return failed(run.recipe, run.path, f"{run.path} is not a folder that all machines share; use another --out")
