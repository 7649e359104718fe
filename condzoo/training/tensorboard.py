"""TensorBoard for a training: what metrics.jsonl and conditioning.jsonl say, as it is written."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from condzoo.probe import write_tensorboard
from condzoo.probe.serialization import from_record
from condzoo.probe.tensorboard import open_writer
from condzoo.training.events import EpochDone, Event, Finished, OnEvent, Started, StepDone
from condzoo.training.run_directory import CONDITIONING, METRICS

FOLDER = "tensorboard"  # in the run directory
TAGS = {  # key of metrics.jsonl -> tag
    "train_loss": "epoch/train_loss",
    "train_accuracy": "epoch/train_accuracy",
    "val_loss": "epoch/val_loss",
    "val_accuracy": "epoch/val_accuracy",
    "test_loss": "epoch/test_loss",
    "test_accuracy": "epoch/test_accuracy",
    "images_per_second": "epoch/images_per_second",
    "loss": "step/loss",
    "lr": "step/lr",
    "grad_norm": "step/grad_norm",
}


class TensorBoard:
    """An `on_event` of `train` that writes RUN/tensorboard, and passes every event on.

        with TensorBoard() as board:
            train(recipe, on_event=board)

    A run that goes on goes on there, too; one that had none before is written from its first step.

    Args:
        then: another `on_event`, such as a progress bar.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, then: OnEvent | None = None) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("TensorBoard is not installed: pip install 'condzoo[tensorboard]', or leave it out")
        self.then = then
        self.writer: Any = None
        self.path = Path()
        self.read: dict[str, int] = {}
        self.first_step = 0

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Write what is new, and pass the event on."""
        if isinstance(event, Started):
            self.open(event)
        elif isinstance(event, StepDone | EpochDone | Finished) and self.writer is not None:
            self.write_new()
        if isinstance(event, Finished):
            self.close()
        if self.then is not None:
            self.then(event)

    def open(self, event: Started) -> None:
        """The writer of a run; lines of metrics that an earlier process wrote are there already.

        What an earlier try wrote that has begun again goes: TensorBoard would draw both. The last step before is
        written again, too: an evaluation after it may have been cut off, to be made again.
        """
        self.close()
        self.path, self.read = event.path, {METRICS: 0, CONDITIONING: 0}
        self.first_step = max(0, event.start_step - 1) if (event.path / FOLDER).is_dir() else 0
        if not self.first_step:
            for stale in (event.path / FOLDER).glob("events.out.tfevents.*"):
                stale.unlink()
        self.writer = open_writer(event.path / FOLDER, start_step=self.first_step)

    def write_new(self) -> None:
        """The lines that came since the last call, where who looks at them sees them at once."""
        before = dict(self.read)
        for record in self.new_records(METRICS):
            of_step = record["kind"] == "step"  # which says its own number; an epoch's line, how many were taken
            step = record["step"] if of_step else max(0, record["step"] - 1)
            if step < self.first_step:
                continue
            for key, tag in TAGS.items():
                if record.get(key) is not None and tag.startswith("step/") == of_step:
                    self.writer.add_scalar(tag, record[key], step)
        for record in self.new_records(CONDITIONING):
            if record["step"] >= self.first_step:
                write_tensorboard(from_record(record), self.writer)
        if self.read != before:
            self.writer.flush()

    def new_records(self, name: str) -> Iterator[dict[str, Any]]:
        """The whole lines of a .jsonl file from where it was last read."""
        path = self.path / name
        if file_size(path) <= self.read[name]:
            return
        with path.open("rb") as file:
            file.seek(self.read[name])
            for line in file:
                if line.endswith(b"\n"):
                    self.read[name] += len(line)
                    yield json.loads(line)

    def complete(self, run: Path) -> None:
        """Write the files of a finished run that has none, from its records."""
        if (run / FOLDER).is_dir():
            return
        self.close()
        self.path, self.read, self.first_step = run, {METRICS: 0, CONDITIONING: 0}, 0
        self.writer = open_writer(run / FOLDER)
        self.write_new()
        self.close()

    def close(self) -> None:
        """Write everything out."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def file_size(path: Path) -> int:
    """Bytes; 0 where there is no file."""
    return path.stat().st_size if path.exists() else 0
