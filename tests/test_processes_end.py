"""The command in several processes: what the first has to say is said before torchrun ends all that are left."""

import os
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from condzoo import cli, probe
from condzoo.training import distributed, reports
from tests.forked import forked
from tests.training.rank_runs import become, free_port

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="forks"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
RECIPE = """
iterations = 3
log_every = 1
model.name = "mlp3x16"
data = { name = "digits", batch_size = 400 }
optim = { name = "sgd", lr = 1e30 }
probe.every = 1
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """For the processes, which are forked from this one; drawing takes longer than these trainings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(reports, "plot_records", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    yield
    torch.set_num_threads(threads)


def slowly(function):
    """The function, later: half a second is five of torchrun's looks whether a process has left."""

    def later(*args, **kwargs):
        time.sleep(0.5)
        return function(*args, **kwargs)

    return later


def as_of_torchrun(folder, command, args):
    """What each of two processes printed; as one leaves with an exit code, the other is ended."""
    port = free_port()

    def run(rank):
        sys.stdout = sys.stderr = (folder / f"rank{rank}.txt").open("w", buffering=1)
        become(rank, 2, port)
        command(rank, [str(arg) for arg in args])

    with ExitStack() as stack:
        processes = [stack.enter_context(forked(partial(run, rank))) for rank in range(2)]
        while all(process.is_alive() for process in processes):
            time.sleep(0.02)
        for process in processes:
            process.terminate()
            process.join()
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(2)]


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_a_wrong_recipe_is_said_though_the_first_process_is_late(tmp_path):
    def command(rank, args):
        (cli.main if rank else slowly(cli.main))(args)

    first, second = as_of_torchrun(tmp_path, command, ["train", written(tmp_path, f"ema = 3.0\n{RECIPE}")])
    assert first.startswith("error: ")
    assert "ema: got 3.0" in first
    assert second == ""


def test_what_the_first_process_does_not_come_to_is_said_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "SECONDS_TO_BE_ENDED", 0.1)

    def command(rank, args):
        cli.main(args) if rank else time.sleep(distributed.SECONDS_TO_BE_ENDED + 60)

    first, second = as_of_torchrun(tmp_path, command, ["train", tmp_path / "not here.toml"])
    assert first == ""
    assert second.startswith("error: no recipe")


@pytest.mark.parametrize("seeds", [(), ("--seeds", "1-2")])
def test_what_follows_a_divergence_is_written_and_said(seeds, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "one_line", slowly(cli.one_line))
    monkeypatch.setattr(probe, "plot_comparison", slowly(lambda runs, path: path.touch()))
    out = tmp_path / "out"
    args = ["train", written(tmp_path, RECIPE), *seeds, "--out", out, "--device", "cpu"]
    first, second = as_of_torchrun(tmp_path, lambda rank, args: cli.main(args), args)
    if seeds:
        assert (out / "conditioning.png").exists()
        assert first.splitlines()[-1].split() == ["runs:", str(out)]
    else:
        assert "diverged: the loss of step 1 is not finite" in first.splitlines()[-1]
    assert second == ""
