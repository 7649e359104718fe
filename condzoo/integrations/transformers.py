"""The probe as a callback of Hugging Face's Trainer: callbacks=[ProbeCallback(every=100)]. Extra: `transformers`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condzoo.integrations.settings import check_settings
from condzoo.probe import Probe
from condzoo.probe.hooks import Hook
from condzoo.probe.wrappers import unwrapped

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_pt_utils import LabelSmoother
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pip install 'condzoo[transformers]'", name=error.name) from error

MEAN, SUM = 1, 2  # torch's numbers for a loss's reduction
STEPS_BEFORE = 8  # that a loss may take after its reduction: sums of several, factors, casts

# The Probes that are open, and the state of the run of each: one object a run, the same for all of its callbacks.
_open: WeakKeyDictionary[Probe, TrainerState] = WeakKeyDictionary()


class ProbeCallback(TrainerCallback):
    """Measures the Trainer's model every so many optimizer steps; weights come out bitwise as without it.

    Accumulated batches, resumed runs, bf16 and DDP (two processes, gloo) are tested; fp16's loss scale is written for,
    and was not run yet. Accumulated batches count alike: where the loss is divided by the items of all of them
    together (`num_items_in_batch`), they should have equally many. Whether a model does so is seen where it returns
    the loss. Of a loss that is made elsewhere (`compute_loss_func`, a `compute_loss` of one's own) the n accumulated
    batches are taken for divided by n: `loss_scale=n` undoes that.

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
        self._batches, self._own_mean = 0, False
        self._look_handle: RemovableHandle | None = None
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
        assert self.probe is not None
        self._batches, self._own_mean = 1, False
        if self.probe.due:
            self._look_handle = _at_next_output(self.probe.model, partial(self._look, args))

    def _look(self, args: TrainingArguments, keywords: dict[str, Any], output: Any) -> None:
        """Whether the loss is the mean of one batch where the items of all accumulated ones were given to divide by."""
        if "num_items_in_batch" in keywords:
            takes = inspect.signature(LabelSmoother.__call__).parameters  # older ones take each batch's mean
            smoothed = bool(args.label_smoothing_factor) and "num_items_in_batch" not in takes
            self._own_mean = smoothed or _is_mean(output)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more."""
        self._batches += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has moved."""
        assert self.probe is not None
        if self._look_handle is not None:  # a loss of one's own may call parts of the model alone
            self._look_handle.remove()
        self.probe.loss_scale = self.settings.get("loss_scale", 1.0) * self._factor(args)
        self.probe.step()

    def _factor(self, args: TrainingArguments) -> float:
        """What a batch's mean loss was multiplied by, in all.

        Where the Trainer gives `num_items_in_batch` it leaves the division by the number of batches to that, and
        multiplies by the processes whose items it counts; a loss that is not divided by it has these factors alone.
        """
        if self._own_mean:
            return float(args.world_size) if args.average_tokens_across_devices else 1.0
        return 1 / self._batches

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hooks off."""
        self._open.close()


def _at_next_output(model: nn.Module, look: Callable[[dict[str, Any], Any], None]) -> RemovableHandle:
    """Call `look` with the keywords and the output of the model's next call in train mode, once."""

    def note(module: nn.Module, args: Any, keywords: dict[str, Any], output: Any) -> None:
        if module.training:
            handle.remove()
            look(keywords, output)

    handle = model.register_forward_hook(Hook(note, model), with_kwargs=True)
    return handle


def _is_mean(output: Any) -> bool:
    """Whether the loss that a model returns is one of torch's, reduced to the mean over its batch.

    A loss that is divided by the items of several batches is a sum over its own first. What nothing is known of is
    taken for such a one.
    """
    first = output[:1] if isinstance(output, tuple) else ()
    loss = output.get("loss") if isinstance(output, dict) else next(iter(first), None)
    nodes = [loss.grad_fn] if isinstance(loss, Tensor) and loss.grad_fn is not None else []
    found: set[int] = set()
    for _ in range(STEPS_BEFORE):
        found |= {node._saved_reduction for node in nodes if hasattr(node, "_saved_reduction")}
        nodes = [before for node in nodes for before, _ in node.next_functions if before is not None]
    return MEAN in found and SUM not in found


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
