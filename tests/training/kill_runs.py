"""Kill a small training again and again, at random moments, until it is through; then compare.

    python -m tests.training.kill_runs FOLDER --kills 200 --seed 1

Prints one JSON object: how often the run was killed, how often with a file half written or a checkpoint
of which only the tensors were there ("torn"), and which results differ from those of a run that was left
alone. Every process is forked from this one, so that a kill costs no imports.
"""

import argparse
import hashlib
import json
import random
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from condzoo.training import reports, train
from condzoo.training.recipe import parse_recipe
from tests.forked import LIMIT, forked
from tests.training.timeless import timeless

VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {"optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}},
    "adam": {"optim": {"name": "adam", "lr": 0.002}, "schedule": {"name": "cosine", "warmup_epochs": 0.5}},
    "average": {
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "schedule": {"name": "step", "milestones": [5, 12], "unit": "iteration", "reset_momentum": True},
        "ema": 0.9,
    },
}


def training(folder: Path, variant: str) -> AbstractContextManager[BaseProcess]:
    """A process that trains into the folder, killed as the block ends."""
    recipe = parse_recipe(
        {
            "iterations": 16,  # eleven an epoch
            "seed": 3,
            "save_every": 0.1,  # every step
            "log_every": 3,
            "model": {"name": "cifar_resnet8_lastbn", "drop_rate": 0.1},
            "data": {"name": "digits", "batch_size": 128, "augment": "standard"},
            "probe": {"every": 6},
            **VARIANTS[variant],
        }
    )
    return forked(lambda: train(recipe, out=folder, device="cpu"))


def killed_until_done(folder: Path, variant: str, pauses: Sequence[float]) -> tuple[int, int]:
    """Train, killed after each pause of so many seconds; (kills until it was through, those of them while writing)."""
    torn = 0
    for killed, pause in enumerate((*pauses, LIMIT)):
        before = half_written(folder)
        with training(folder, variant) as process:
            process.join(pause)
        if process.exitcode == 0:
            return killed, torn
        if process.exitcode != -signal.SIGKILL:
            break
        torn += bool(half_written(folder) - before)
    raise RuntimeError(f"the run did not go on after {killed} kills: exit code {process.exitcode}")


def half_written(folder: Path) -> set[tuple[str, int]]:
    """(name, time) of files under their temporary name, and of tensors whose checkpoint has no numbers yet."""
    files = list(folder.rglob("*.tmp"))
    files += [path for path in folder.glob("checkpoints/*.safetensors") if not path.with_suffix(".json").exists()]
    return {(path.name, path.stat().st_mtime_ns) for path in files}


def results(folder: Path) -> dict[str, str]:
    """Name -> digest of everything that must be equal: weights, last checkpoint, records without times."""
    stored = {"weights": (folder / "model.safetensors").read_bytes()}
    stored["checkpoint"] = sorted((folder / "checkpoints").glob("*.safetensors"))[-1].read_bytes()
    stored["conditioning"] = (folder / "conditioning.jsonl").read_bytes()
    for name in ("metrics.jsonl", "summary.json"):
        stored[name] = repr(timeless(folder / name)).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in stored.items()}


def kill_and_compare(folder: Path, kills: int, seed: int, longest: float = 0.35) -> dict[str, Any]:
    """Run every variant, left alone and killed.

    Args:
        folder: of the runs.
        kills: of each variant; a run may be through before all of them, and then another one takes the rest.
        seed: of the moments.
        longest: of a pause before a kill, as a share of a whole run's time.

    Returns:
        Variant -> how many kills, how many of them while writing, how many runs took them, which results differ.
    """
    draw = random.Random(seed)
    report: dict[str, Any] = {}
    for variant in VARIANTS:
        began = time.perf_counter()
        killed_until_done(folder / f"{variant}-alone", variant, ())
        most = (time.perf_counter() - began) * longest
        wanted, done, torn, runs, differ = results(folder / f"{variant}-alone"), 0, 0, 0, set()
        while done < kills:
            run = folder / f"{variant}-killed{runs}"
            more, halfway = killed_until_done(run, variant, [draw.uniform(0, most) for _ in range(kills - done)])
            done, torn, runs, found = done + more, torn + halfway, runs + 1, results(run)
            differ |= {name for name in wanted if wanted[name] != found[name]}
        report[variant] = {"kills": done, "torn": torn, "runs": runs, "differ": sorted(differ)}
    return report


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=9, help="for each variant")
    parser.add_argument("--longest", type=float, default=0.35, help="of a pause, as a share of a whole run's time")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reports.plot_records = lambda *_: None  # drawing takes longer than the training
    print(json.dumps(kill_and_compare(arguments.folder, arguments.kills, arguments.seed, arguments.longest)))


if __name__ == "__main__":
    main()
