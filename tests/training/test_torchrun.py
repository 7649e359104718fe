"""Under torchrun: two processes train the weights of one, and a killed one is started again and goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from condzoo.training import StepDone, train
from condzoo.training.recipe import dump_recipe, parse_recipe
from tests.forked import LIMIT, forked
from tests.training.rank_runs import free_port, in_processes, trained

RECIPE = parse_recipe(
    {
        "iterations": 4,
        "precision": "fp32",  # auto is bf16 on some CPUs, whose rounding depends on how a batch is split
        "model": {"name": "cifar_resnet8_nobn"},
        "data": {"name": "digits", "batch_size": 359, "augment": "paper"},
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    }
)


def test_torchrun_with_two_processes_trains_the_weights_of_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe(RECIPE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["condzoo", "train", str(path), "--out", str(tmp_path / "two"), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    train(RECIPE, out=tmp_path / "one", device="cpu")
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6
    assert '"processes": 2' in (tmp_path / "two/summary.json").read_text()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_is_killed_among_two_agents_is_started_again_and_goes_on(tmp_path: Path) -> None:
    """Two machines, as torchrun sees them: its agents start both processes again, bit for bit.

    Agents and workers are forks of this process: as commands each of them imports torch, which takes seconds.
    """
    recipe = RECIPE.model_copy(update={"save_every": 0.2})  # every step
    out, killed = tmp_path / "killed", tmp_path / "was killed"
    settings = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        max_restarts=2,
        run_id="killed",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"keep_alive_max_attempt": 60},  # of 5 seconds: on a busy machine an agent may be late
        local_addr="127.0.0.1",
        start_method="fork",
    )

    def kill(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 2 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        train(recipe, out=out, device="cpu", on_event=kill)

    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(forked(elastic_launch(settings, work))) for _ in range(2)]
        for agent in agents:
            agent.join(LIMIT)
            agent.terminate()  # one that hangs ends its processes
            agent.join()
    assert [agent.exitcode for agent in agents] == [0, 0]
    starts = [entry["start_step"] for entry in json.loads((out / "environment.json").read_text())]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]
    assert in_processes(2, trained(tmp_path / "whole", recipe), tmp_path) == [["done"], ["done"]]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
