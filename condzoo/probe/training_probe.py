"""`Probe`: measure a network inside its own training loop, from the steps it takes anyway."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import nn

from condzoo.probe import distributed
from condzoo.probe.arguments import checked, folder, grad_scaler, positive, whole_number
from condzoo.probe.capture import capture_of
from condzoo.probe.conditioning import Conditioning
from condzoo.probe.finishing import finish
from condzoo.probe.hooks import apart
from condzoo.probe.layers import choose
from condzoo.probe.neurons import counts
from condzoo.probe.passes import coarsest
from condzoo.probe.records import FILE_NAME, append_record, drop_torn_line
from condzoo.probe.step_passes import StepPasses
from condzoo.probe.step_weights import StepWeights
from condzoo.probe.tensorboard import open_writer, settled, write_tensorboard
from condzoo.probe.weights import norms_of, widened
from condzoo.probe.wrappers import refuse_scripted, refuse_threads, structure, uncompiled, unwrapped

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SPLIT = "it is split over processes in the forward pass (tensor parallelism), where none sees the whole layer"


class Probe:
    """Measures a model every so many training steps from the step's own forward and backward pass.

        with Probe(model, every=100, out="runs/x") as probe:
            for x, y in batches:
                optimizer.zero_grad()
                loss_function(model(x), y).backward()
                optimizer.step()
                probe.step()

    The weights that come out are bitwise those of training without it. Hooks are on the model only in
    the steps that are due, and read forwards in train mode with gradients enabled: evaluation between
    steps is not recorded. Backward passes within a step add up (gradient accumulation).

    Under data-parallel training (also FSDP's) every process runs its Probe; the sums over all of them are
    measured, and the first one writes. What is compiled runs uncompiled in the steps that are due, since a
    compiled graph has no hooks: those steps cost what an eager step costs, and round as it does.

    Args:
        model: the module that trains, or its DDP, FSDP or torch.compile wrapper.
        every: steps 0, every, 2 * every, ... are measured; 0 measures none.
        out: folder for `conditioning.jsonl`, one line a measurement; made if need be, appended to if
            there. None writes nothing: see `latest`.
        tensorboard: a folder for TensorBoard's event files, or an open `SummaryWriter`; needs the
            `tensorboard` extra. What it shows: `write_tensorboard`.
        layers, conv, precision, bias, kappa: as in `measure`.
        neurons: count dying and full units; weights: norms of the weights and their gradients. Without them a
            measurement is cheaper: moments and spectra alone.
        start_step: the number of the next step, where a run goes on.
        reduction: whether the loss is the "mean" or the "sum" over the batch.
        loss_scale: what the loss was multiplied by before backward, for example 1 / n for n
            accumulated batches; may be set anew each step, at any time before `step()`. Of several processes each
            has its own, as where they weigh their losses by their samples; `weight_grad` is the mean so weighed.
        scaler: the GradScaler that scales the loss on top of that (or timm's NativeScaler around one); its scale at
            the step's first forward pass is undone.
        softmax: whether the loss is a softmax cross-entropy (also with smoothed labels). Where it is known to be, its
            null is named however small the gradients become; None: not known.

    Attributes:
        latest: the last `Conditioning`, None before the first.

    Raises:
        TypeError, ValueError: a setting that is not allowed; says what is.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        out: str | Path | None = None,
        tensorboard: str | Path | SummaryWriter | None = None,
        layers: Sequence[str] | None = None,
        conv: str = "channels",
        precision: str = "auto",
        bias: bool = False,
        kappa: bool = True,
        neurons: bool = True,
        weights: bool = True,
        start_step: int = 0,
        reduction: str = "mean",
        loss_scale: float = 1.0,
        scaler: Any = None,
        softmax: bool | None = None,
    ) -> None:
        every, start_step = whole_number("every", every), whole_number("start_step", start_step)
        checked("reduction", reduction, ("mean", "sum"))
        positive("loss_scale", loss_scale)
        refuse_threads(model)
        model = unwrapped(model)
        refuse_scripted(model)
        self.model, self.every, self.reduction, self.loss_scale = model, every, reduction, loss_scale
        self.softmax = softmax
        written = folder("out", out)
        self.path = None if written is None else written / FILE_NAME
        self.latest: Conditioning | None = None
        chosen, self._unmeasurable = choose(model, layers)
        self._names, self._structure = None if layers is None else list(layers), structure(model)
        self._capture = capture_of(
            model, chosen, conv=conv, precision=precision, bias=bias, kappa=kappa, neurons=neurons, trains=True
        )
        self._weights = StepWeights(self._capture.layers, self._capture.attentions, measured=weights)
        self._capture.split = self._weights.split
        self._capture.functions.on_weight = partial(apart, self._weights.look)
        self._step = start_step
        self._tensorboard, self._own_writer = settled(tensorboard), False
        self._scaler, self._scaler_scale = grad_scaler(scaler), 1.0
        self._eager = ExitStack()
        self._passes = StepPasses(
            model, self._capture, self._weights, mean=reduction == "mean", on_first=self._begin_step
        )
        self._open = False

    def __enter__(self) -> Probe:
        """Ready for the first step: the output folder exists, and the hooks are on if it is due."""
        if self._open:
            raise RuntimeError("this Probe is open already; a second loop at the same time needs a Probe of its own")
        if self.path is not None and distributed.first():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_torn_line(self.path)
        if isinstance(self._tensorboard, (str, Path)) and distributed.first():
            self._tensorboard = open_writer(self._tensorboard, start_step=self._step)
            self._own_writer = True
        self._open = True
        try:
            if self.due:
                self._attach()
        except BaseException:  # Ctrl-C, too: what could not begin is not ended by `with`
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take every hook off, also after an exception; close the TensorBoard writer opened here."""
        self._detach()
        self._open = False
        if self._own_writer:
            assert self._tensorboard is not None
            assert not isinstance(self._tensorboard, (str, Path))
            self._tensorboard.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """What a copy or pickle is made of: None of one that is open, since a copy of a network is not probed."""
        return (_none, ()) if self._open else super().__reduce_ex__(protocol)

    @property
    def due(self) -> bool:
        """Whether the step now being taken is measured."""
        return self.every > 0 and self._step % self.every == 0

    def begin(self, batch: Any) -> None:
        """Say that a forward pass over this batch begins; needed only where the model itself is not called.

        A model that is called, as `model(x)`, says so itself. One whose methods or parts are called, as
        `model.encode(x)`, does not; then this comes before each batch of the step.

        Args:
            batch: a tensor with a leading batch dimension, or a tuple, list or dict that holds one.
        """
        self._must_be_open("begin")
        if self.due:
            apart(self._passes.begin, batch)

    def step(self) -> None:
        """Say that a training step is over; measures it if it was due.

        Raises:
            RuntimeError: outside `with`.
        """
        self._must_be_open("step")
        if self.due:
            self._detach()
            if batches := distributed.largest(self._passes.count, self.model):
                apart(self._record, batches)
            else:
                warnings.warn(
                    f"step {self._step} was due, but no forward pass in train mode with gradients was seen (one that "
                    "raised, or whose backward pass did, does not count); is this the model that trains, and is the "
                    "loop inside `with Probe(...)`?",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._step += 1
        if self.due:
            self._attach()

    def _must_be_open(self, call: str) -> None:
        if not self._open:
            raise RuntimeError(
                f"probe.{call}() outside `with`: put the training loop inside `with Probe(...) as probe:` (where no "
                "block can be, contextlib.ExitStack().enter_context(probe) opens it and .close() ends it)"
            )

    def _attach(self) -> None:
        self._capture.clear()
        self._capture.recording, self._capture.gradients = False, True
        self._passes.attach()
        self._eager.enter_context(uncompiled())

    def _detach(self) -> None:
        self._capture.detach()
        self._weights.detach()
        self._passes.detach()
        self._eager.close()

    def _begin_step(self) -> None:
        if (now := structure(self.model)) != self._structure:
            self._structure = now
            self._look_again()
        self._weights.measure()
        self._scaler_scale = 1.0 if self._scaler is None else self._scaler.get_scale()

    def _look_again(self) -> None:
        """Watch what the model has become: layers were put in, replaced or taken out since it was last looked at."""
        chosen, self._unmeasurable = choose(self.model, self._names, known=True)
        self._weights.detach()
        self._capture.follow(chosen)
        self._weights.attach()

    def _record(self, batches: int) -> None:
        capture, grads, mean = self._capture, self._weights.grads, self.reduction == "mean"
        weight = 0.0  # of these gradients, in all: what each pass, or sample, of a process was multiplied by
        if self._passes.count:
            scale = self._scale()  # of this process alone: each may weigh its loss by its share of the samples
            weight = scale * (self._weights.passes if mean else self._passes.samples)
            for sums in capture.sums.values():
                sums.output_grad.rescale(1 / scale)
        samples, of_weights = self._passes.samples, self._weights.norms
        if distributed.active():
            parts = {"split": bool(self._weights.split), "later": self._weights.later}
            if distributed.sum_over_ranks(capture, self.model, **parts):
                grads, weight, samples = {}, 0.0, 0
            samples = distributed.total(samples, self.model)
            grads, weight, of_weights = distributed.summed(grads, weight, of_weights, self.model)
            grads = {name: grad for name, grad in grads.items() if name in capture.layers}
        with torch.no_grad():
            if weight != 1.0:
                grads = {name: widened(grad) / weight for name, grad in grads.items()}
            norms = norms_of(capture.layers, grads)
            layers, unseen, nonfinite = finish(capture, of_weights, norms, softmax=self.softmax, mean=mean)
        neurons, uncounted = counts(capture.neurons)
        split = dict.fromkeys(self._weights.split, SPLIT)
        if split:
            neurons, uncounted = {}, dict.fromkeys(capture.neurons, SPLIT)
        self.latest = Conditioning(
            layers=layers,
            neurons=neurons,
            skipped={**self._unmeasurable, **unseen, **split, **uncounted},
            mode="train",
            dtype=coarsest(capture.dtypes) if capture.dtypes else "",
            labels="data",
            conv=capture.conv,
            bias=capture.bias,
            precision=capture.precision,
            kappa=capture.kappa,
            samples=samples,
            batches=batches,
            step=self._step,
            first_nonfinite=nonfinite,
        )
        self._weights.clear()
        capture.clear()
        if not distributed.first():
            return
        if self.path is not None:
            append_record(self.path, self.latest)
        if self._tensorboard is not None:
            write_tensorboard(self.latest, self._tensorboard)

    def _scale(self) -> float:
        return positive("probe.loss_scale", self.loss_scale) * self._scaler_scale


def _none() -> None:
    """The copy of an open Probe, as that of a module that holds its own."""
