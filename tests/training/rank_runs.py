"""Train in several processes on this machine, each forked from this one, so that a process costs no imports.

A case trains one or more runs into folders of a folder and returns run -> what each process's call of `train`
came to: "done", the error's class and text, or the exit code of a process that crashed.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image

from condzoo.training import Recipe, StepDone, preparation, run_all, train, train_seeds
from condzoo.training.distributed import STARTED_BY_LAUNCHER
from condzoo.training.recipe import parse_recipe
from condzoo.training.rehearsal import rehearse
from tests.forked import forked

Outcomes = list[list[str]]

# The last batch of an epoch is one image: three of four processes have none of it.
EVERYTHING: dict[str, Any] = {
    "iterations": 7,  # five an epoch
    "seed": 3,
    "precision": "fp32",  # auto is bf16 on some CPUs, whose rounding depends on how a batch is split
    "log_every": 2,
    "accumulate": 3,
    "grad_clip": 1.0,
    "ema": 0.8,
    "freeze": ["conv1.*"],
    "model": {"name": "cifar_resnet8_nobn"},
    "data": {"name": "digits", "batch_size": 359, "augment": "paper", "drop_last": False},
    "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "loss": {"label_smoothing": 0.1},
    "probe": {"every": 2},
}
FULL_BATCH = {
    "epochs": 5,
    "model": {"name": "mlp4x24"},
    "data": {"name": "digits", "batch_size": 479},
    "optim": {"name": "gd", "lr": 0.3, "momentum": 0.5},
}
NORMS = {
    "iterations": 14,  # eleven an epoch
    "seed": 2,
    "save_every": 0.3,
    "model": {"name": "cifar_resnet8_lastbn", "drop_rate": 0.2},
    "data": {"name": "digits", "batch_size": 128, "augment": "standard"},
    "optim": {"name": "adam", "lr": 0.002},
    "probe": {"every": 5},
}
AVERAGED = NORMS | {"iterations": 5, "precision": "fp32", "ema": 0.9}
DIVERGING = NORMS | {"optim": {"name": "sgd", "lr": 1e30}}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def become(rank: int, world: int, port: int) -> None:
    """Have what torchrun gives one of its processes on one machine."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def in_processes(world: int, action: Callable[[int], Any], folder: Path) -> Outcomes:
    """What an action came to in each of `world` processes, given their ranks."""
    port = free_port()
    files = [folder / f"outcome{rank}.json" for rank in range(world)]
    for file in files:
        file.unlink(missing_ok=True)  # an earlier run's

    def run(rank: int) -> None:
        become(rank, world, port)
        try:
            action(rank)
            outcome = ["done"]
        except BaseException as error:
            outcome = [type(error).__name__, str(error)]
        files[rank].write_text(json.dumps(outcome))

    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(forked(partial(run, rank))) for rank in range(world)]
        for process in processes:
            process.join()
    return [
        json.loads(file.read_text()) if process.exitcode == 0 else [f"exit code {process.exitcode}"]
        for file, process in zip(files, processes, strict=True)
    ]


def trained(folder: Path, recipe: Recipe, **arguments: Any) -> Callable[[int], Any]:
    """The action that trains into a folder."""
    return lambda rank: train(recipe, out=folder, device="cpu", **arguments)


def equal(folder: Path) -> dict[str, Outcomes]:
    """The same recipes in 1, 2 and 4 processes."""
    return {
        f"{name}{world}": in_processes(world, trained(folder / f"{name}{world}", parse_recipe(tables)), folder)
        for name, tables in (("everything", EVERYTHING), ("full_batch", FULL_BATCH))
        for world in (1, 2, 4)
    }


def stopped(folder: Path) -> dict[str, Outcomes]:
    """Four processes left alone; four of which one gets a signal; the same going on; and going on as two."""
    recipe = parse_recipe(NORMS)

    def signalled(rank: int) -> None:
        """The third process gets a SIGTERM in its seventh step."""
        taken = preparation.training_steps
        if rank == 2:

            def with_signal(training: Any, start: int, stop: int) -> Any:
                for batch in taken(training, start, stop):
                    if batch.step == 6:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

            sys.modules["condzoo.training.loop"].training_steps = with_signal  # type: ignore[attr-defined]
        train(recipe, out=folder / "stopped", device="cpu")

    report = {"whole": in_processes(4, trained(folder / "whole", recipe), folder)}
    report["signalled"] = in_processes(4, signalled, folder)
    report["stopped"] = in_processes(4, trained(folder / "stopped", recipe), folder)
    report["fewer"] = in_processes(4, trained(folder / "fewer", recipe, max_steps=5), folder)
    report["fewer"] += in_processes(2, trained(folder / "fewer", recipe, on_event=noting(folder)), folder)
    return report


def noting(folder: Path) -> Callable[[Any], None]:
    """An on_event that writes down every notice, and how often a step was told."""

    def note(event: Any) -> None:
        with (folder / "events.txt").open("a") as file:
            file.write(f"{type(event).__name__} {getattr(event, 'text', '')}\n")
            if isinstance(event, StepDone):
                assert os.environ["RANK"] == "0"

    return note


def failing(folder: Path) -> dict[str, Outcomes]:
    """What fails in one process, or in all."""
    recipe = parse_recipe(NORMS)

    def no_data_in_the_second(rank: int) -> None:
        if rank == 1:

            def read_data(*arguments: Any) -> None:
                raise FileNotFoundError("no digits here")

            preparation.read_data = read_data  # type: ignore[assignment]
        train(recipe, out=folder / "no_data", device="cpu")

    def no_space(rank: int) -> None:
        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        sys.modules["condzoo.training.loop"].save_checkpoint = full  # type: ignore[attr-defined]
        train(recipe, out=folder / "no_space", device="cpu")

    def no_line(writer: str) -> Callable[[int], Any]:
        """The action in which a line of records cannot be written, which the first process alone does."""

        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        def action(rank: int) -> None:
            sys.modules[writer].append_record = full  # type: ignore[attr-defined]
            train(recipe, out=folder / writer, device="cpu", max_steps=3)

        return action

    synchronized = parse_recipe(NORMS | {"sync_bn": True})
    small = parse_recipe(NORMS | {"data": {"name": "digits", "batch_size": 1}, "model": {"name": "mlp4x24"}})
    (folder / "locked").mkdir()
    report = {
        "diverging": in_processes(2, trained(folder / "diverging", parse_recipe(DIVERGING)), folder),
        "no_data": in_processes(2, no_data_in_the_second, folder),
        "no_space": in_processes(2, no_space, folder),
        "no_metrics": in_processes(2, no_line("condzoo.training.reports"), folder),
        "no_conditioning": in_processes(2, no_line("condzoo.probe.training_probe"), folder),
        "sync_bn": in_processes(2, trained(folder / "sync_bn", synchronized), folder),
        "small": in_processes(2, trained(folder / "small", small), folder),
    }
    for split in ("train", "val"):
        report[f"damaged_{split}"] = in_processes(2, on_damaged_images(folder / f"damaged_{split}", split), folder)
    with FileLock(folder / "locked/.lock"):
        report["locked"] = in_processes(2, trained(folder / "locked", recipe), folder)
    return report


def on_damaged_images(folder: Path, split: str) -> Callable[[int], Any]:
    """The action that trains on class folders of which one image is cut short: one process alone meets it."""
    for part, name, number in itertools.product(("train", "val"), ("ant", "bee"), range(4)):
        path = folder / "images" / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(path)
        if (part, name, number) == (split, "bee", 1):
            path.write_bytes(path.read_bytes()[:40])
    data = {"name": "imagefolder", "batch_size": 8, "image_size": 16, "workers": 0}
    return trained(folder / "run", parse_recipe(NORMS | {"data": data, "accumulate": 2}), data_root=folder / "images")


def seeds(folder: Path) -> dict[str, Outcomes]:
    """One seed, then two; each process with a folder of its own, as on machines that share none."""
    recipe = parse_recipe(NORMS)

    def of_seeds(*numbers: int) -> Callable[[int], Any]:
        return lambda rank: train_seeds(recipe, numbers, folder / f"of{rank}", max_steps=2, device="cpu")

    return {"one": in_processes(2, of_seeds(1), folder), "two": in_processes(2, of_seeds(1, 2), folder)}


def in_a_callers_group(folder: Path) -> dict[str, Outcomes]:
    """Many runs in a group that no launcher made: one that fails, then three of which a signal stops the rest.

    The second process gets a SIGTERM as the first of three ends. What the processes are told is in events0 and events1.
    """
    recipe = parse_recipe(NORMS)
    (folder / "failing/blocked").mkdir(parents=True)
    (folder / "failing/blocked/thesis.tex").touch()

    def grouped(rank: int) -> None:
        for name in STARTED_BY_LAUNCHER:
            del os.environ[name]
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

        def note(event: Any) -> None:
            with (folder / f"events{rank}").open("a") as file:
                file.write(f"{getattr(event, 'text', '')}\n")

        many = sys.modules["condzoo.training.sweep"]
        run_one = many.train_to_any_end  # type: ignore[attr-defined]

        def then_signal(*arguments: Any) -> Any:
            run = run_one(*arguments)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return run

        many.train_to_any_end = then_signal  # type: ignore[attr-defined]
        run_all({"blocked": recipe}, folder / "failing", device="cpu", on_event=note)
        train_seeds(recipe, [1, 2, 3], folder / "seeds", max_steps=1, device="cpu", on_event=note)

    return {"stopped": in_processes(2, grouped, folder)}


def rehearsed(folder: Path) -> dict[str, Outcomes]:
    """A dry run in one process and in two, and one that several on CPUs refuse."""

    def rehearsing(name: str, tables: dict[str, Any]) -> Callable[[int], Any]:
        def action(rank: int) -> None:
            found = rehearse(parse_recipe(tables), device="cpu")
            content = {"loss": found.loss, "grad_norm": found.grad_norm, "probed": found.probed}
            (folder / f"{name}{rank}.json").write_text(json.dumps(content))

        return action

    return {
        "one": in_processes(1, rehearsing("one", EVERYTHING), folder),
        "two": in_processes(2, rehearsing("two", EVERYTHING), folder),
        "sync_bn": in_processes(2, rehearsing("sync_bn", NORMS | {"sync_bn": True}), folder),
    }


def averaged(folder: Path) -> dict[str, Outcomes]:
    """Two processes with BatchNorm and an average."""
    return {"two": in_processes(2, trained(folder / "two", parse_recipe(AVERAGED)), folder)}


CASES = {
    "equal": equal,
    "averaged": averaged,
    "stopped": stopped,
    "failing": failing,
    "seeds": seeds,
    "in_a_callers_group": in_a_callers_group,
    "rehearsed": rehearsed,
}
