"""How far a run is, and its whole state as tensors and numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condzoo.training.data_sets import class_names, renamed
from condzoo.training.environment import describe_environment
from condzoo.training.events import Notice, OnEvent
from condzoo.training.optimizers import load_optimizer_tensors, optimizer_tensors
from condzoo.training.preparation import Training
from condzoo.training.resume import Checkpoint, newest_checkpoint
from condzoo.training.run_directory import (
    CHECKPOINTS,
    CONDITIONING,
    ENVIRONMENT,
    METRICS,
    SUMMARY,
    RunDirectoryError,
    checksum,
    durable_size,
    read_json,
    read_metrics,
    read_summary,
    truncate,
    write_json,
)
from condzoo.training.steps import StepResult


@dataclass
class Progress:
    """Steps done, and the sums over the current epoch.

    `seconds` and `epoch_seconds` are time spent training, over all processes that worked on the run.
    """

    loss_sum: Tensor  # float64 []
    correct: Tensor  # int64 []
    images: int = 0
    step: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    unchecked: list[int] = field(default_factory=list)  # images of each step since the last check

    def add(self, result: StepResult, seconds: float) -> None:
        """Count one step."""
        self.loss_sum += result.loss_sum
        self.correct += result.correct
        self.images += result.images
        self.step += 1
        self.seconds += seconds
        self.epoch_seconds += seconds
        self.unchecked.append(result.images)

    def rewind(self, step: int) -> None:
        """Go back to before a step that was taken in since the last check; the sums never had it."""
        while self.step > step:
            self.images -= self.unchecked.pop()
            self.step -= 1

    def end_epoch(self) -> None:
        """Start the sums of the next epoch."""
        self.loss_sum, self.correct = torch.zeros_like(self.loss_sum), torch.zeros_like(self.correct)
        self.images, self.epoch_seconds = 0, 0.0

    @property
    def loss(self) -> float:
        """Mean training loss of the epoch so far."""
        return float(self.loss_sum) / max(self.images, 1)

    @property
    def accuracy(self) -> float:
        """Share of right answers in the epoch so far, on the augmented images as trained."""
        return int(self.correct) / max(self.images, 1)

    @property
    def images_per_second(self) -> float:
        """Over the epoch so far, evaluation and checkpoints left out."""
        return self.images / self.epoch_seconds if self.epoch_seconds else 0.0


def start_of(training: Training) -> Progress:
    """The progress of a run that has not begun."""
    device = training.numerics.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    return Progress(loss_sum, torch.zeros((), dtype=torch.int64, device=device))


def capture(training: Training, progress: Progress, path: Path) -> Checkpoint:
    """The whole state between two steps. Data order and dropout need none: they follow from the step."""
    tensors = {f"model.{key}": value for key, value in training.model.state_dict().items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizer_tensors(training.optimizer).items()}
    if training.average is not None:
        tensors |= {f"average.{key}": value for key, value in training.average.state_dict().items()}
    tensors |= {"progress.loss_sum": progress.loss_sum, "progress.correct": progress.correct}
    sizes = {name: durable_size(path / name) for name in (METRICS, CONDITIONING)}
    numbers: dict[str, Any] = {
        "step": progress.step,
        "images": progress.images,
        "seconds": progress.seconds,
        "epoch_seconds": progress.epoch_seconds,
        "scaler": training.scaler.state_dict(),
        "threads": torch.get_num_threads(),
        "processes": training.ranks.world,
        **arithmetic(training),
        **data_seen(training),
        "bytes": sizes,
        "metrics_crc32": checksum(path / METRICS, sizes[METRICS]),
    }
    return Checkpoint(tensors, numbers)


def restore(training: Training, checkpoint: Checkpoint) -> Progress:
    """Put the captured state back into the parts of a run."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}, "progress": {}}
    for key, value in checkpoint.tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    numbers, device = checkpoint.numbers, training.numerics.device
    training.model.load_state_dict(parts["model"])
    load_optimizer_tensors(training.optimizer, parts["optimizer"])
    if training.average is not None:
        training.average.load_state_dict(parts["average"])
    training.scaler.load_state_dict(numbers["scaler"])
    return Progress(
        parts["progress"]["loss_sum"].to(device),
        parts["progress"]["correct"].to(device),
        numbers["images"],
        numbers["step"],
        numbers["seconds"],
        numbers["epoch_seconds"],
    )


def go_on(training: Training, path: Path, notify: OnEvent) -> Progress:
    """Restore the newest whole checkpoint, or start; records made after it are cut off, to be made again.

    Of several processes the first one reads, and hands the state to the others.
    """
    checkpoint = training.ranks.first_does(lambda: take_up(training, path, notify))
    return start_of(training) if checkpoint is None else restore(training, checkpoint)


def take_up(training: Training, path: Path, notify: OnEvent) -> Checkpoint | None:
    """The newest whole checkpoint, with the records as they were at it.

    environment.json gets an entry for every time that the run was taken up. It is written before records are cut off:
    where nothing can be written, none are.

    Raises:
        RunDirectoryError: the run was trained on other images, or to an end whose checkpoints are lost, or a record is
            damaged: it is read at the end, after all training.
    """
    checkpoint = newest_checkpoint(path / CHECKPOINTS, lambda text: notify(Notice(text)))
    sizes, step = {METRICS: 0, CONDITIONING: 0}, 0
    if checkpoint is None:
        check_nothing_ended(path)
    else:
        check_data(training, checkpoint, path)
        sizes, step = checkpoint.numbers["bytes"], checkpoint.numbers["step"]
        for difference in differences(training, checkpoint):
            notify(Notice(difference))
    environment = path / ENVIRONMENT
    earlier = read_json(environment) if environment.exists() else []
    now = describe_environment(training.numerics) | {"processes": training.ranks.world}
    write_json(environment, [*earlier, {"start_step": step, **now}])
    for name, size in sizes.items():
        if not truncate(path / name, size):
            notify(Notice(f"{path / name} has lost records from before step {step}"))
    read_metrics(path / METRICS)
    if checkpoint is not None and records_changed(path, checkpoint):
        notify(Notice(f"{path / METRICS} is not what it was when step {step} was saved: a record was changed since"))
    return checkpoint


def arithmetic(training: Training) -> dict[str, Any]:
    """What `auto` and the machine, which no recipe names, have made of a run's arithmetic."""
    numerics = training.numerics
    return {
        "precision": numerics.precision,
        "channels_last": numerics.channels_last,
        "device": numerics.device.type,
    }


def data_seen(training: Training) -> dict[str, Any]:
    """What tells one data set from another under the same recipe, which names only its folder or not even that."""
    data = training.data
    return {"classes": data.num_classes, "training_images": data.size("train"), "class_names": class_names(data)}


def records_changed(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether the metrics are as many bytes as at a checkpoint, and others; an old one does not say."""
    size, now = checkpoint.numbers["bytes"][METRICS], durable_size(path / METRICS)
    sum_ = checksum(path / METRICS, size)
    return size == now and checkpoint.numbers.get("metrics_crc32", sum_) != sum_


def check_nothing_ended(path: Path) -> None:
    """RunDirectoryError where a run has ended and left no checkpoint: going on would cut off all of its records.

    A run that was copied without its large files is one.
    """
    steps = read_summary(path)["steps"] if (path / SUMMARY).is_file() else 0
    if steps:
        raise RunDirectoryError(
            f"{path} was trained to step {steps:,} and holds no checkpoint to go on from: training again would cut off "
            f"its records; use another --out, or delete its {SUMMARY} to start again"
        )


def check_data(training: Training, checkpoint: Checkpoint, path: Path) -> None:
    """RunDirectoryError where the run was trained on other images, as far as a checkpoint (an old one not) says it."""
    here = data_seen(training)
    there = {name: checkpoint.numbers.get(name, count) for name, count in here.items()}
    if any(there[name] != here[name] for name in ("classes", "training_images")):
        counts = "{training_images} training images of {classes} classes"
        raise RunDirectoryError(
            f"{path} was trained on {counts.format(**there)}, and the data here have {counts.format(**here)}; name its "
            "own data by --data-root, or use another --out"
        )
    if changed := renamed(there["class_names"], here["class_names"]):
        raise RunDirectoryError(
            f"{path} was trained on classes of other names: {changed}, and names say which output is whose; name its "
            "own data by --data-root, or use another --out"
        )


def differences(training: Training, checkpoint: Checkpoint) -> Iterator[str]:
    """What has changed since a checkpoint was made that keeps the run from going on bitwise."""
    was, now = checkpoint.numbers["threads"], torch.get_num_threads()
    if was != now:
        yield f"the run began with {was} threads and goes on with {now}: sums may round differently"
    was, now = checkpoint.numbers.get("processes", 1), training.ranks.world
    if was != now:
        yield (
            f"the run began with {was} processes and goes on with {now}: the global batch stays, sums round "
            "differently, and BatchNorm's and dropout's draws are those of the new parts"
        )
    here = arithmetic(training)
    there = {name: checkpoint.numbers.get(name, value) for name, value in here.items()}  # an old one says none
    if there != here:
        yield f"the run was trained {in_words(there)} and goes on {in_words(here)}: each step rounds differently"


def in_words(found: dict[str, Any]) -> str:
    """ "in bf16 (channels_last) on cuda" of an `arithmetic`."""
    memory_format = " (channels_last)" if found["channels_last"] else ""
    return f"in {found['precision']}{memory_format} on {found['device']}"
