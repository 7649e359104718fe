"""The probe as a Lightning callback: Trainer(callbacks=[ProbeCallback(every=100)]). Extra: `lightning`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from condzoo.integrations.settings import check_settings
from condzoo.probe import Probe
from condzoo.probe.batches import batch_size

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pip install 'condzoo[lightning]'", name=error.name) from error


class ProbeCallback(pl.Callback):
    """Measures the LightningModule every so many optimizer steps; weights come out bitwise as without it.

    Accumulated batches, resumed runs, bf16 and DDP (two processes, gloo) are tested; fp16's loss scale and other
    distributed strategies are written for, and were not run yet. `training_step` must return the mean loss over
    its batch (or set `reduction="sum"`).

    Args:
        every: optimizer steps from one measurement to the next, as in `Probe`.
        out: folder for `conditioning.jsonl`; None takes the trainer's `log_dir`, else its `default_root_dir`.
        samples: how many samples a batch has, or a tensor whose leading dimension they are, as
            `lambda batch: batch.num_graphs`; None takes the first tensor in it.
        settings: any other keyword of `Probe` but `start_step`: layers, conv, precision, kappa, tensorboard ...
            `loss_scale` is what the loss is multiplied by besides the trainer's own factors; a `scaler` takes the
            place of the trainer's.

    Raises:
        TypeError, ValueError: a setting that is not allowed.

    Attributes:
        probe: the `Probe`, from the start of training on; `probe.latest` is the last measurement.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        out: str | Path | None = None,
        samples: Callable[[Any], Tensor | SupportsIndex] | None = None,
        **settings: Any,
    ) -> None:
        check_settings(every, out, settings)
        if samples is not None and not callable(samples):
            raise TypeError(f"samples must be a function of a batch, as lambda batch: len(batch), got {samples!r}")
        self.every, self.out, self.samples, self.settings = every, out, samples, settings
        self.probe: Probe | None = None
        self._steps = 0  # the trainer's, which counts those of every optimizer
        self._taken = 0  # as the records number them: one a batch, or so many accumulated ones
        self._restored: int | None = None
        self._open = ExitStack()

    @property
    def state_key(self) -> str:
        """Tells the callbacks of one Trainer apart in its checkpoints."""
        plain = {
            key: value for key, value in self.settings.items() if isinstance(value, (str, int, float, list, tuple))
        }
        return self._generate_state_key(every=self.every, out=str(self.out), **plain)

    def state_dict(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: the steps taken."""
        return {"steps": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint; one without this callback's state goes on from the trainer's steps."""
        self._restored = state_dict["steps"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ready for the first step, or the one where the run goes on."""
        out = self.out or trainer.log_dir or trainer.default_root_dir
        scaler = self.settings.get("scaler") or getattr(trainer.precision_plugin, "scaler", None)
        settings = {**self.settings, "scaler": scaler}
        if self._restored is not None:
            self._taken, self._restored = self._restored, None
        elif trainer.global_step != self._steps:  # else the trainer goes on where this callback has followed it to
            self._taken = trainer.global_step
        self._steps = trainer.global_step
        probe = Probe(pl_module, self.every, out=out, start_step=self._taken, **settings)
        self.probe = self._open.enter_context(probe)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """`training_step` follows, which may call any part of the module.

        Raises:
            TypeError: nothing says how many samples the batch has.
        """
        assert self.probe is not None
        if _averages(trainer):
            self._open.close()
        elif self.probe.due:
            self.probe.begin(self._counted(batch))

    def _counted(self, batch: Any) -> Any:
        """The batch, or a tensor with as many samples."""
        if self.samples is not None:
            found = self.samples(batch)
            return found if isinstance(found, Tensor) and found.ndim else torch.empty(operator.index(found), 0)
        try:
            batch_size(batch)
        except TypeError as error:
            raise TypeError(
                f"{error}; pass ProbeCallback(samples=lambda batch: ...), the number of samples in a batch, as "
                "batch.num_graphs or len(batch), or a tensor whose leading dimension they are"
            ) from None
        return batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over if the optimizer has moved; else the batch is one of several accumulated."""
        assert self.probe is not None
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._taken += 1
            if not _averages(trainer):
                self.probe.loss_scale = self.settings.get("loss_scale", 1.0) / trainer.accumulate_grad_batches
                self.probe.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hooks off."""
        self._open.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Hooks off."""
        self._open.close()


def _averages(trainer: pl.Trainer) -> bool:
    """Whether this is StochasticWeightAveraging's epoch after the last, for BatchNorm's statistics: nothing trains."""
    return bool(getattr(getattr(trainer, "fit_loop", None), "_skip_backward", False))
