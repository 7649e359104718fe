"""The command itself under torchrun: two processes train the weights of one."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from condzoo.training import train
from condzoo.training.recipe import dump_recipe, parse_recipe

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
