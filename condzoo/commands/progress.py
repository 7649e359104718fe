"""The progress of a training: a bar on a terminal, a line an epoch anywhere else."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from condzoo.training import EpochDone, Event, Finished, Message, Notice, Started, StepDone

SECONDS_BETWEEN_LINES = 30.0  # off a terminal, within an epoch


class TrainingProgress:
    """Shows the events of `condzoo.train`; used as a context manager, and as its `on_event`.

    Several runs may follow each other (a sweep): each gets a bar, or lines, of its own. On a narrow terminal it is the
    bar itself that is short: numbers are not cut, and fit 80 columns.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: Started | None = None
        self.last_line = self.began = 0.0
        self.task: TaskID | None = None
        self.bar = Progress(
            BarColumn(bar_width=None, table_column=Column(max_width=10)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.clear()
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Started):
            self.start(event)
        elif isinstance(event, StepDone):
            self.step(event)
        elif isinstance(event, EpochDone):
            self.say(epoch_line(event, self.started))
        elif isinstance(event, Notice):
            self.say(Text(event.text, style="yellow"))
        elif isinstance(event, Message):
            self.say(Text(event.text, style="bold"))
        elif isinstance(event, Finished):  # its result is in the table to come
            self.clear()

    def say(self, line: str | Text) -> None:
        """A line above the bar, or a plain line."""
        self.console.print(line, soft_wrap=True)
        self.last_line = time.monotonic()

    def start(self, event: Started) -> None:
        """A new run: its name, where it trains, and where it goes on from."""
        self.clear()  # of a run that failed nothing says that it ended
        self.started = event
        name = event.recipe.model.name
        resumed = f", going on from step {event.start_step}" if event.start_step else ""
        where = f"{event.parameters:,} parameters, {event.device} in {event.precision}, into {event.path}"
        self.say(f"{name}: {where}{resumed}")
        self.began = time.monotonic()
        self.task = self.bar.add_task(name, total=event.last_step, completed=event.start_step, state="", left="")

    def step(self, event: StepDone) -> None:
        """Loss, accuracy, speed, and the conditioning of the last layer's input when it was last probed."""
        loss = f"{event.loss:.3f}" if event.loss < 1e3 else f"{event.loss:.3g}"
        state = f"loss {loss}  acc {event.accuracy:.1%}  {event.images_per_second:,.0f} images/s"
        last_layer, left = event.last_layer or {}, time_text(self.seconds_left(event))
        if self.task is not None and not self.bar.disable:
            kappa = next((f"  kappa {value:.3g}" for name, value in last_layer.items() if "kappa" in name), "")
            self.bar.update(self.task, completed=event.step + 1, state=state + kappa, left=left)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            conditioning = f"  last layer: {conditioning_text(last_layer)}" if last_layer else ""
            self.say(f"step {event.step + 1}  {state}{conditioning}  {left} left")

    def seconds_left(self, event: StepDone) -> float:
        """Until the last step, at the speed of this run so far; rich's own would forget steps 30 seconds apart."""
        assert self.started is not None
        done = event.step + 1 - self.started.start_step
        return (self.started.last_step - event.step - 1) * (time.monotonic() - self.began) / done

    def clear(self) -> None:
        """The bar of a run goes when the run does."""
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


def time_text(seconds: float) -> str:
    """A duration as people read it: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def conditioning_text(last_layer: dict[str, float]) -> str:
    """The last layer's input in two numbers."""
    return "  ".join(f"{name} {value:.3g}" for name, value in last_layer.items())


def epoch_line(event: EpochDone, started: Started | None) -> str:
    """What an epoch came to, in one line."""
    metrics = event.metrics
    epochs = f"/{-(-started.total_steps // started.steps_per_epoch)}" if started else ""
    parts = [f"epoch {event.epoch + 1}{epochs}"]
    for key, label, form in (
        ("train_loss", "loss", ".4f"),
        ("train_accuracy", "train acc", ".2%"),
        ("val_error", "val error", ".2%"),
        ("test_error", "test error", ".2%"),
        ("images_per_second", "images/s", ",.0f"),
    ):
        if metrics.get(key) is not None:
            parts.append(f"{label} {metrics[key]:{form}}")
    return "  ".join(parts)
