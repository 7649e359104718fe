"""Under torchrun: two processes train the weights of one, and a killed one is started again and goes on."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from condzoo.training import train
from condzoo.training.recipe import dump_recipe, parse_recipe
from tests.training.rank_runs import in_processes, trained

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


KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
from condzoo.training import StepDone, load_recipe, train

out, killed = Path(sys.argv[2]), Path(sys.argv[3])

def kill(event):
    if isinstance(event, StepDone) and event.step == 2 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)

train(load_recipe(sys.argv[1]), out=out, device="cpu", on_event=kill)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_is_killed_among_two_agents_is_started_again_and_goes_on(tmp_path: Path) -> None:
    """Two machines, as torchrun sees them: its agents start both processes again, bit for bit."""
    recipe = RECIPE.model_copy(update={"save_every": 0.2})  # every step
    path, program, out = tmp_path / "recipe.toml", tmp_path / "killed_once.py", tmp_path / "killed"
    path.write_text(dump_recipe(recipe))
    program.write_text(KILLED_ONCE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "2", "--rdzv-id", "killed", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    command += ["--rdzv-conf", "keep_alive_max_attempt=60"]  # of 5 seconds: on a busy machine an agent may be late
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", str(program), str(path), str(out), str(tmp_path / "was killed")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    logs = [(tmp_path / f"agent{node}.txt").open("w+") for node in range(2)]
    agents = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for log in logs]
    try:
        for agent in agents:
            agent.wait(timeout=300)
    finally:
        for agent in agents:  # which end their processes
            agent.terminate()
        for agent, log in zip(agents, logs, strict=True):
            agent.wait()
            log.seek(0)
            print(log.read())
            log.close()
    assert [agent.returncode for agent in agents] == [0, 0]
    starts = [entry["start_step"] for entry in json.loads((out / "environment.json").read_text())]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1]
    assert in_processes(2, trained(tmp_path / "whole", recipe), tmp_path) == [["done"], ["done"]]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
