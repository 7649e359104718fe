"""What the callbacks take of `Probe`'s settings, checked before the training begins."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from condzoo.probe import Probe
from condzoo.probe.arguments import folder, grad_scaler, positive
from condzoo.probe.tensorboard import settled


def check_settings(every: int, out: str | Path | None, settings: dict[str, Any]) -> None:
    """An error where `Probe` has no such setting, or the trainer has it.

    Raises:
        TypeError: a name that `Probe` does not know, a folder that is none, a scaler that has no scale.
        ValueError: `start_step`, or a `loss_scale` that is none.
    """
    inspect.signature(Probe).bind(None, every, out=out, **settings)
    if "start_step" in settings:
        raise ValueError("start_step is counted by the trainer, and goes on where a resumed run does; leave it out")
    positive("loss_scale", settings.get("loss_scale", 1.0))
    folder("out", out)
    settled(settings.get("tensorboard"))
    grad_scaler(settings.get("scaler"))
