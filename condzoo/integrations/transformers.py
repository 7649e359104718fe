"""The probe as a callback of Hugging Face's Trainer: callbacks=[ProbeCallback(every=100)]. Extra: `transformers`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from condzoo.integrations.settings import check_settings
from condzoo.probe import Probe
from condzoo.probe.wrappers import unwrapped

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pip install 'condzoo[transformers]'", name=error.name) from error

# The Probes that are open, and the state of the run of each: one object a run, the same for all of its callbacks.
_open: WeakKeyDictionary[Probe, TrainerState] = WeakKeyDictionary()


class ProbeCallback(TrainerCallback):
    """Measures the Trainer's model every so many optimizer steps; weights come out bitwise as without it.

    Accumulated batches, resumed runs, bf16 and DDP (two processes, gloo) are tested; fp16's loss scale is written for,
    and was not run yet. Accumulated batches count alike: where the Trainer divides by the items of all
    of them together, they should have equally many.

    Args:
        every: optimizer steps from one measurement to the next, as in `Probe`.
        out: folder for `conditioning.jsonl`; None takes the Trainer's `output_dir`.
        settings: any other keyword of `Probe` but `start_step`: layers, conv, precision, kappa, tensorboard ...
            `loss_scale` is what the loss is multiplied by besides the trainer's own factors; a `scaler` takes the
            place of the trainer's.

    Raises:
        TypeError, ValueError: a setting that is not allowed.

    Attributes:
        probe: the `Probe`, from the start of training on; `probe.latest` is the last measurement.
    """

    def __init__(self, every: int = 100, *, out: str | Path | None = None, **settings: Any) -> None:
        check_settings(every, out, settings)
        self.every, self.out, self.settings = every, out, settings
        self.probe: Probe | None = None
        self._batches = 0
        self._open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ready for the first step, or the one where the run goes on.

        Raises:
            ValueError: the Trainer runs the model by nn.DataParallel.
        """
        out, model = self.out or args.output_dir, kwargs["model"]
        _refuse_threads(args, model)
        self._open.close()
        _close_earlier(unwrapped(model), state)
        scaler = self.settings.get("scaler") or getattr(kwargs.get("optimizer"), "scaler", None)
        settings = {**self.settings, "scaler": scaler}
        probe = Probe(model, self.every, out=out, start_step=state.global_step, **settings)
        self.probe = self._open.enter_context(probe)
        _open[probe] = state
        self._open.callback(_open.pop, probe, None)

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
        self.probe.loss_scale = self.settings.get("loss_scale", 1.0) / self._batches
        self.probe.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hooks off."""
        self._open.close()


def _refuse_threads(args: TrainingArguments, model: nn.Module) -> None:
    """A ValueError where the Trainer has the model in nn.DataParallel, of which the callbacks see the inside."""
    quantized = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))  # those it does not wrap
    if args.n_gpu > 1 and not quantized:
        raise ValueError(
            f"the Trainer trains on {args.n_gpu} GPUs by nn.DataParallel, which runs copies of the model in "
            "threads, whose hooks cannot be told apart; start the script with torchrun, a process a GPU, or let it see "
            "one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def _close_earlier(model: nn.Module, state: TrainerState) -> None:
    """Close the Probes of runs of this model that an exception ended, which the Trainer tells no callback."""
    for probe, run in list(_open.items()):
        if probe.model is model and run is not state:
            probe.__exit__(None, None, None)
            del _open[probe]
