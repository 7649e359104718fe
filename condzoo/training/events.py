"""What `train` reports while it runs: plain data for a progress bar, a log or a dashboard."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condzoo.training.schema import Recipe


@dataclass(frozen=True)
class Started:
    """The network and the data are ready; `start_step` is above 0 where a run goes on."""

    path: Path
    recipe: Recipe
    device: str
    precision: str
    start_step: int
    last_step: int
    steps_per_epoch: int
    total_steps: int
    parameters: int


@dataclass(frozen=True)
class StepDone:
    """An optimizer step was taken; `loss` and `accuracy` are means over the epoch so far."""

    step: int
    epoch: int
    loss: float
    accuracy: float
    lr: float
    images_per_second: float
    last_layer: dict[str, float] | None  # lambda_max and kappa of its input, when last probed


@dataclass(frozen=True)
class EpochDone:
    """An epoch ended; `metrics` is its line of metrics.jsonl."""

    epoch: int
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Notice:
    """Something a person should read, e.g. that a damaged checkpoint was passed over."""

    text: str


@dataclass(frozen=True)
class Message:
    """How a set of runs gets on, e.g. which one is next; or that nothing is left to do."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The run ended; `summary` is its summary.json."""

    summary: dict[str, Any]


Event = Started | StepDone | EpochDone | Notice | Message | Finished
OnEvent = Callable[[Event], None]
