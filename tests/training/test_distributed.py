"""Several processes train what one trains; they stop, fail and go on together."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from condzoo.probe import read_records
from condzoo.training import Stopped, distributed, reports
from condzoo.training.distributed import ALONE, Ranks, said_elsewhere, synchronize_norms
from tests.training import rank_runs
from tests.training.timeless import timeless

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="forks"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
Report = dict[str, list[list[str]]]


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_no_pictures() -> Iterator[None]:
    """For the processes, which are forked from this one: drawing takes longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "plot_records", lambda *_: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def run_case(case: str, folder: Path) -> Report:
    return rank_runs.CASES[case](folder)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equal")
    assert {tuple(outcome) for outcomes in run_case("equal", folder).values() for outcome in outcomes} == {("done",)}
    return folder


def test_a_process_that_crashes_is_not_taken_for_an_earlier_one(tmp_path: Path) -> None:
    assert rank_runs.in_processes(2, lambda rank: None, tmp_path) == [["done"], ["done"]]
    crashed = rank_runs.in_processes(2, lambda rank: os._exit(3) if rank else None, tmp_path)
    assert crashed == [["done"], ["exit code 3"]]


def metrics(run: Path) -> list[dict[str, Any]]:
    return timeless(run / "metrics.jsonl")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["everything", "full_batch"])
def test_without_batch_norm_several_processes_train_the_weights_of_one(name: str, world: int, equal: Path) -> None:
    one, several = (load_file(equal / f"{name}{n}" / "model.safetensors") for n in (1, world))
    assert one.keys() == several.keys()
    assert max(float((one[key] - several[key]).abs().max()) for key in one) < 1e-6


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["everything", "full_batch"])
def test_metrics_are_those_of_all_images(name: str, world: int, equal: Path) -> None:
    one, several = (metrics(equal / f"{name}{n}") for n in (1, world))
    assert len(one) == len(several) > 4
    for ours, theirs in zip(one, several, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-5)
    summary = json.loads((equal / f"{name}{world}/summary.json").read_text())
    assert (summary["test_images"], summary["processes"]) == (360, world)


@pytest.mark.parametrize("world", [2, 4])
def test_the_probe_measures_the_global_batch(world: int, equal: Path) -> None:
    one, several = (read_records(equal / f"everything{n}") for n in (1, world))
    assert [r.step for r in one] == [r.step for r in several] == [0, 2, 4, 6]
    assert [r.samples for r in several] == [359, 359, 1, 359]
    for ours, theirs in zip(one, several, strict=True):
        for name, layer in ours.items():
            for side in ("input", "output_grad"):
                a, b = getattr(layer, side), getattr(theirs[name], side)
                assert a.rows == b.rows
                assert a.lambda_max == pytest.approx(b.lambda_max, rel=1e-4)
            assert layer.weight_grad == pytest.approx(theirs[name].weight_grad, rel=1e-3)


def test_all_stop_at_the_step_in_which_one_gets_a_signal_and_go_on(tmp_path: Path) -> None:
    report = run_case("stopped", tmp_path)
    assert report["signalled"] == [["Stopped", "stopped by SIGTERM at step 7; run the same command to go on"]] * 4
    assert report["whole"] == report["stopped"] == [["done"]] * 4
    whole, stopped, fewer = (tmp_path / name for name in ("whole", "stopped", "fewer"))
    expected = load_file(whole / "model.safetensors")
    again = load_file(stopped / "model.safetensors")
    assert all(torch.equal(expected[key], again[key]) for key in expected)
    assert metrics(whole) == metrics(stopped)
    assert (whole / "conditioning.jsonl").read_bytes() == (stopped / "conditioning.jsonl").read_bytes()
    assert [e["start_step"] for e in json.loads((stopped / "environment.json").read_text())] == [0, 7]
    # Four processes, then two: it is said, and the training is the same but for BatchNorm's and dropout's parts.
    assert report["fewer"] == [["done"]] * 6
    events = (tmp_path / "events.txt").read_text()
    assert "Notice the run began with 4 processes and goes on with 2: the global batch stays, sums round" in events
    assert events.count("StepDone") == 14 - 5
    assert json.loads((fewer / "summary.json").read_text())["steps"] == 14


def test_several_seeds_in_several_processes_are_written_by_the_first(tmp_path: Path) -> None:
    report = run_case("seeds", tmp_path)
    assert report["one"] == report["two"] == [["done"]] * 2
    assert json.loads((tmp_path / "of0/summary.json").read_text())["settings"][""]["seeds"] == [1, 2]
    assert not (tmp_path / "of1").exists()


def test_many_runs_in_a_group_of_the_callers_are_told_and_stopped_together(tmp_path: Path) -> None:
    report = run_case("in_a_callers_group", tmp_path)
    stopped = ["Stopped", "stopped by SIGTERM between two runs; run the same command to go on"]
    assert report["stopped"] == [stopped, stopped]
    told = (tmp_path / "events0").read_text()
    assert "blocked failed: " in told
    assert "[1/3] seed1" in told
    assert not (tmp_path / "events1").exists()
    assert not (tmp_path / "seeds/seed2").exists()


def test_what_fails_in_one_process_fails_in_all_alike(tmp_path: Path) -> None:
    report = run_case("failing", tmp_path)
    for outcomes in report.values():
        assert len(outcomes) == 2
        assert outcomes[0] == outcomes[1]
    said = {name: outcomes[0] for name, outcomes in report.items()}
    assert said["diverging"][0] == "Diverged"
    assert "diverged: the loss of step 1 is not finite, first in layer1.0.conv1" in said["diverging"][1]
    assert json.loads((tmp_path / "diverging/summary.json").read_text())["steps"] == 1
    assert said["no_data"] == ["FileNotFoundError", "no digits here"]
    for name in ("no_space", "no_metrics", "no_conditioning"):
        assert said[name] == ["OSError", "[Errno 28] No space left on device"]
    assert said["sync_bn"][1].startswith("sync_bn: SyncBatchNorm runs on GPUs only, and these processes are on CPUs")
    assert said["small"][1] == "data.batch_size: got 1, must be at least the number of processes (2)"
    assert "is in use by another run; wait for it, or use another --out" in said["locked"][1]
    for split in ("train", "val"):
        assert f"images/{split}/bee/1.png is no image; replace it" in said[f"damaged_{split}"][1]
        assert not (tmp_path / f"damaged_{split}/run/summary.json").exists()


def test_sync_bn_makes_batch_norms_use_the_global_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4))
    assert synchronize_norms(model, ALONE, torch.device("cpu")) is model
    before = model.state_dict()
    converted = synchronize_norms(model, Ranks(0, 8), torch.device("cuda"))  # modules only: no GPU is asked
    kinds = [type(module) for module in converted]
    assert kinds == [nn.Conv2d, nn.SyncBatchNorm, nn.Flatten, nn.SyncBatchNorm]
    assert converted.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("device", "local", "here", "expected"),
    [
        ("cuda:1", 0, 2, r"device: each process takes a GPU of its own, got cuda:1; use --device cuda$"),
        ("cuda", 2, 2, r"process 2 of this machine has no GPU, it sees 2; use --nproc-per-node 2, or --device cpu$"),
        ("cuda", 3, 1, r"process 3 .* sees 1; .*; where each process is shown one of its own, set LOCAL_RANK=0$"),
        ("cuda", 1, 2, "cuda:1"),
    ],
)
def test_each_process_takes_the_gpu_of_its_number(
    device: str, local: int, here: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if expected.startswith("cuda"):
        assert distributed._own_device(device) == torch.device(expected)
    else:
        with pytest.raises(ValueError, match=expected):
            distributed._own_device(device)


@pytest.mark.parametrize(
    ("backends", "expected"), [("cuda:nccl", "cuda:3"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu")]
)
def test_a_number_goes_where_the_group_can_exchange_it(
    backends: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value, op: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch, "tensor", lambda value, device="cpu": places.append(str(device)) or value)
    assert (Ranks(0, 2).largest(15), places) == (15, [expected])


def test_a_dry_run_in_two_processes_is_the_first_step_of_both(tmp_path: Path) -> None:
    report = run_case("rehearsed", tmp_path)
    assert report["one"] + report["two"] == [["done"]] * 3
    assert {outcome[1].split(":")[0] for outcome in report["sync_bn"]} == {"sync_bn"}, "they know of each other"
    one, two, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one0", "two0", "two1"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert other == two


def test_before_processes_meet_each_machines_first_says_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another waits to be ended, and says it if it is not."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, local, waits in (("0", "0", []), ("8", "0", []), ("1", "1", [30.0])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert not said_elsewhere(ValueError("no such recipe"))
        assert waited == waits
    assert said_elsewhere(Stopped("by a signal that the first has, too"))
    assert waited == [30.0]


def test_of_the_processes_without_a_gpu_the_first_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have one wait for it, and would say nothing."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(distributed, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, waits in (("2", []), ("3", [30.0])):
        monkeypatch.setenv("RANK", local)
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(ValueError, match=f"process {local} of this machine has no GPU, it sees 2") as caught:
            distributed._own_device(None)
        assert not said_elsewhere(caught.value)
        assert waited == waits


def test_a_process_tries_out_no_gpu_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying out "cuda" takes memory of the current GPU; without a launcher that is the one that the caller has set."""
    current, tried = [1], []

    def try_out(device: str) -> torch.device:
        tried.append(current[0])
        return torch.device(device)

    monkeypatch.setattr(distributed, "resolve_device", try_out)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed._own_device("cuda") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed._own_device("cuda") == torch.device("cuda:3")
    assert tried == [1, 3]
