"""The probe as a callback of Hugging Face's Trainer: callbacks=[ProbeCallback(every=100)]. Extra: `transformers`."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from condzoo.probe import Probe


class ProbeCallback(TrainerCallback):
    """Measures the Trainer's model every so many optimizer steps; weights come out bitwise as without it.

    Accumulated batches, resumed runs, bf16 and DDP (two processes, gloo) are tested; fp16's loss scale is written for,
    and was not run yet. Accumulated batches count alike: where the Trainer divides by the items of all
    of them together, they should have equally many.

    Args:
        every: optimizer steps from one measurement to the next, as in `Probe`.
        out: folder for `conditioning.jsonl`; None takes the Trainer's `output_dir`.
        settings: any other keyword of `Probe`: layers, conv, precision, kappa, tensorboard ...

    Attributes:
        probe: the `Probe`, from the start of training on; `probe.latest` is the last measurement.
    """

    def __init__(self, every: int = 100, *, out: str | Path | None = None, **settings: Any) -> None:
        inspect.signature(Probe).bind(None, every, out=out, **settings)  # a wrong name fails here, not in training
        self.every, self.out, self.settings = every, out, settings
        self.probe: Probe | None = None
        self._batches = 0
        self._open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ready for the first step, or the one where the run goes on."""
        self._open.close()  # of a run that an exception ended, which the Trainer tells no callback
        out, model = self.out or args.output_dir, kwargs["model"]
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        probe = Probe(model, self.every, out=out, start_step=state.global_step, scaler=scaler, **self.settings)
        self.probe = self._open.enter_context(probe)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first of the batches that one step accumulates."""
        self._batches = 1

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more."""
        self._batches += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has moved."""
        assert self.probe is not None
        self.probe.loss_scale = 1 / self._batches
        self.probe.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hooks off."""
        self._open.close()
