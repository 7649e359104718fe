"""Runs on a real Ray cluster of this machine: the same results, and nothing lost with a worker."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from condzoo.training import Message, Notice, Run, Stopped, ray_engine, run_all
from condzoo.training.attempts import RunOptions
from condzoo.training.ray_engine import (
    Resources,
    absolute_data_root,
    data_variable,
    default_gpus,
    remote_attempt,
    run_all_on_ray,
)
from condzoo.training.recipe import recipe_tables

ray = pytest.importorskip("ray")
# Ray's own code warns, and its clean-up closes files late.
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs of this machine, and a cluster of this process's own.

    A worker has one thread, as the runs in this process have, whatever the caller sets.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def workers() -> list[int]:
    """Process ids of this process's own Ray workers that are at a run now (Ray writes the task into their titles)."""
    titles, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, title = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:  # it ended
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        titles[int(folder.name)] = title

    def own(pid: int) -> bool:
        """Others' runs on this machine are children of another process."""
        return pid == os.getpid() or (pid in parents and own(parents[pid]))

    runs = (pid for pid, title in titles.items() if title.startswith(b"ray::") and b"remote_attempt" in title)
    return [pid for pid in runs if own(pid)]


def once_there(folder: Path, pattern: str, act: Callable[[], Any]) -> threading.Thread:
    """Call `act` as soon as the folder holds a file of that name."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not list(folder.glob(pattern)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_runs_on_ray_are_those_of_this_process_and_bad_ones_are_recorded(
    tiny: Any, tmp_path: Path, cluster: None
) -> None:
    plain = {"optim.momentum": 0.0, "optim.nesterov": False}
    planned = {"good": tiny(), "wild": tiny(**plain, **{"optim.lr": 1e30}), "blocked": tiny(seed=3)}
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "thesis.tex").write_text("x")
    events: list[Any] = []
    runs = run_all(planned, tmp_path, engine="ray", on_event=events.append)
    assert [run.summary["status"] for run in runs] == ["done", "diverged", "failed"]
    assert "is not a run directory" in runs[2].summary["error"]
    (here,) = run_all({"good": tiny()}, tmp_path / "here", device="cpu")
    weights = [(path / "model.safetensors").read_bytes() for path in (runs[0].path, here.path)]
    assert weights[0] == weights[1]
    assert any(isinstance(event, Message) and "/3] good: test error" in event.text for event in events)
    assert any(isinstance(event, Notice) and "/3] blocked: failed: " in event.text for event in events)
    again: list[Any] = []
    run_all({name: planned[name] for name in ("good", "wild")}, tmp_path, engine="ray", on_event=again.append)
    assert again == [], "a second call runs only what is missing"


def test_a_signal_stops_the_runs_on_ray_saved(tiny: Any, tmp_path: Path, cluster: None) -> None:
    planned = {name: tiny(epochs=10_000, save_every=10_000.0, seed=i) for i, name in enumerate(("a", "b", "c"))}
    watcher = once_there(tmp_path, "a/metrics.jsonl", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match=r"stopped by SIGINT, the runs on Ray with it; run the same command to go on"):
        run_all(planned, tmp_path, engine="ray", device="cpu")
    watcher.join()
    assert not workers()
    assert not (tmp_path / "c").exists(), "two at a time: the third had not begun"
    assert len(list(tmp_path.glob("a/checkpoints/step_*.json"))) == 1, "saved because it was asked to stop"


def test_what_no_machine_has_is_refused(tiny: Any, tmp_path: Path, cluster: None) -> None:
    text = r"a run needs 0 GPUs and 64 CPUs, and no machine of the Ray cluster has them \(0 GPUs and 2 CPUs\)"
    with pytest.raises(ValueError, match=text):
        run_all({"run": tiny()}, tmp_path, engine="ray", cpus_per_run=64)
    with pytest.raises(ValueError, match="device: got 'cuda:1', must be cpu or cuda on Ray"):
        run_all({"run": tiny()}, tmp_path, engine="ray", device="cuda:1")


class FakeRay:
    """A cluster of one machine with two GPUs, of which a run ends as it begins; notes what each task asks for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.exceptions = SimpleNamespace(RayError=RuntimeError)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, "GPU": 2.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.cluster_resources()}]

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> Any:
            self.asked.append(asked)
            return SimpleNamespace(remote=lambda *arguments: "a run")

        return SimpleNamespace(options=options)

    def wait(self, pending: list[str], **options: Any) -> tuple[list[str], list[str]]:
        return pending, []

    def get(self, reference: str) -> dict[str, str]:
        return {"status": "failed", "error": "no machine"}


@pytest.mark.parametrize(
    ("device", "wanted", "gpus"),
    [(None, None, 1.0), ("cuda", None, 1.0), ("cpu", None, 0.0), (None, 0.5, 0.5), ("cuda", 2, 2), (None, 0, 0)],
)
def test_a_run_is_placed_by_the_gpus_it_takes(
    device: Any, wanted: Any, gpus: float, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One where the cluster has any, none for a run on the CPU, a fraction where runs share one."""
    fake = FakeRay()
    monkeypatch.setattr(ray_engine, "connected", lambda: fake)
    events: list[Any] = []
    options = RunOptions(device=device, on_event=events.append)
    runs = run_all_on_ray({"run": tiny()}, tmp_path, options, Resources(wanted, cpus=3))
    assert [(asked["num_gpus"], asked["num_cpus"], asked["max_retries"]) for asked in fake.asked] == [(gpus, 3, 3)]
    assert events[0].text == f"1 runs on Ray, {gpus:g} GPUs and 3 CPUs each, into {tmp_path}"
    assert runs["run"].summary["error"] == "no machine"


def test_without_gpus_in_the_cluster_a_run_takes_none() -> None:
    nowhere = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    assert [default_gpus(nowhere, device) for device in (None, "cuda", "cpu")] == [0.0, 0.0, 0.0]


def test_more_gpus_than_a_machine_has_are_refused(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "connected", FakeRay)
    text = r"a run needs 4 GPUs and 1 CPUs, and no machine of the Ray cluster has them \(2 GPUs and 4 CPUs\)"
    with pytest.raises(ValueError, match=text):
        run_all({"run": tiny()}, tmp_path, engine="ray", gpus_per_run=4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
def test_a_run_whose_worker_is_killed_goes_on_from_its_checkpoint(tiny: Any, tmp_path: Path, cluster: None) -> None:
    recipe = tiny(epochs=30, save_every=0.5)
    (whole,) = run_all({"run": recipe}, tmp_path / "whole", device="cpu")

    def kill() -> None:
        for pid in workers():
            os.kill(pid, signal.SIGKILL)

    killer = once_there(tmp_path, "run/checkpoints/step_*.json", kill)
    (run,) = run_all({"run": recipe}, tmp_path, engine="ray", device="cpu")
    killer.join()
    starts = [entry["start_step"] for entry in run_environment(run.path)]
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] > 0
    assert (run.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_workers_get_the_data_root_as_an_absolute_path(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDZOO_DATA", "images")
    assert absolute_data_root(tiny(), None) is None, "beside a root nothing else is looked at, as beside CONDZOO_DATA"
    assert data_variable() == str(tmp_path / "images")
    assert absolute_data_root(tiny(**{"data.root": "mine"}), None) == str(tmp_path / "mine")
    assert absolute_data_root(tiny(), "given") == str(tmp_path / "given")
    monkeypatch.delenv("CONDZOO_DATA")
    assert data_variable() is None


def test_a_worker_looks_for_images_where_this_process_does(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Under CONDZOO_DATA, then in the user's cache."""
    looked = []

    def note(recipe: Any, path: Path, options: RunOptions) -> Run:
        looked.append((options.data_root, os.environ.get("CONDZOO_DATA")))
        return Run(path, recipe, {})

    monkeypatch.setattr(ray_engine, "attempt", note)
    monkeypatch.setenv("CONDZOO_DATA", "the machine's own")
    for variable in (None, str(tmp_path)):
        remote_attempt(recipe_tables(tiny()), tmp_path / "run", RunOptions(), tmp_path, variable)
    assert looked == [(None, "the machine's own"), (None, str(tmp_path))]


def test_a_worker_works_where_the_paths_of_a_recipe_begin(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    def note(recipe: Any, path: Path, options: Any) -> Run:
        places.append(Path.cwd())
        return Run(path, recipe, {})

    monkeypatch.setattr(ray_engine, "attempt", note)
    before = Path.cwd()
    for folder in (tmp_path, tmp_path / "on another machine"):
        remote_attempt(recipe_tables(tiny()), tmp_path / "run", RunOptions(), folder)
    assert places == [tmp_path, before]
    assert Path.cwd() == before


def test_without_ray_the_error_says_what_to_install(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray is not installed: pip install 'condzoo\[ray\]', or use the engine"):
        run_all({"run": tiny()}, tmp_path, engine="ray")
    with pytest.raises(ValueError, match="engine: got 'slurm', must be one of: local, ray"):
        run_all({"run": tiny()}, tmp_path, engine="slurm")


def test_a_cluster_that_does_not_start_is_an_error_in_one_line(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def init(**options: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...\nand more")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    said = (
        r"^Ray was not reached or started: The current node timed out during startup\..*; try again, or use the engin"
    )
    with pytest.raises(OSError, match=said) as caught:
        run_all({"run": tiny()}, tmp_path, engine="ray")
    assert "\n" not in str(caught.value)


def run_environment(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's environment.json."""
    from condzoo.training.run_directory import read_json

    entries: list[dict[str, Any]] = read_json(path / "environment.json")
    return entries
