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
from condzoo.training.run_directory import CONDITIONING, METRICS, read_metrics

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

    A run that goes on goes on there, too; what it did without a board is filled in from its records.

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
        self.last: dict[str, int] = {}  # tag of metrics -> the step of its last point
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
            self.open(event.path, event.start_step)
        elif isinstance(event, StepDone | EpochDone | Finished) and self.writer is not None:
            self.write_new()
        if isinstance(event, Finished):
            self.close()
        if self.then is not None:
            self.then(event)

    def open(self, path: Path, start_step: int) -> None:
        """The writer of a run that goes on at a step, from the first that its files lack or that is taken again.

        TensorBoard forgets what it has read from there on. The last step before is written again, too: an
        evaluation after it may have been cut off, to be made again, and only a part of it may be there.
        """
        self.close()
        self.path, self.read, self.last = path, {METRICS: 0, CONDITIONING: 0}, {}
        self.first_step = max(0, min(start_step - 1, last_shown(path / FOLDER)))
        self.writer = open_writer(path / FOLDER, start_step=self.first_step)
        self.write_new()

    def write_new(self) -> None:
        """The lines that came since the last call, where who looks at them sees them at once."""
        before = dict(self.read)
        for record in self.new_records(METRICS):
            of_step = record["kind"] == "step"  # which says its own number; an epoch's line, how many were taken
            step = record["step"] if of_step else max(0, record["step"] - 1)
            if step < self.first_step:
                continue
            for key, tag in TAGS.items():
                if record.get(key) is None or tag.startswith("step/") != of_step or self.last.get(tag) == step:
                    continue  # the line of a run's end may repeat what the line of its last epoch says
                self.writer.add_scalar(tag, record[key], step)
                self.last[tag] = step
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
        """Write what the files of a finished run lack, from its records."""
        lines = read_metrics(run / METRICS)
        steps = lines[-1]["step"] if lines else 0
        if last_shown(run / FOLDER) < steps - 1:
            self.open(run, steps)
            self.close()

    def close(self) -> None:
        """Write everything out."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def last_shown(folder: Path) -> int:
    """The last step in the newest event file that has one; -1 without files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        steps = [event.step for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]
        if steps:
            return max(steps)
    return -1


def file_size(path: Path) -> int:
    """Bytes; 0 where there is no file."""
    return path.stat().st_size if path.exists() else 0
