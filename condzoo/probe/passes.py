"""Forward and backward passes over batches, for a capture to read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.probe import label_models, losses
from condzoo.probe.attention import watch_beside, watch_computed_inside
from condzoo.probe.batches import batch_size, call, on_device
from condzoo.probe.capture import Capture
from condzoo.probe.conditioning import Conditioning
from condzoo.probe.finishing import finish
from condzoo.probe.hooks import remove
from condzoo.probe.layers import samples_interact
from condzoo.probe.losses import Labels, Loss
from condzoo.probe.neurons import counts
from condzoo.probe.weights import Norms, norms_of, own_weight, watch_computed, widened

MANY = 2000  # backward passes a batch that are worth a warning


class Passes:
    """The state of one measurement: the capture's sums, the mean weight gradients and the mean loss."""

    def __init__(
        self,
        model: nn.Module,
        capture: Capture,
        labels: Labels,
        loss: Loss | None,
        seed: int,
        reduction: str | None = None,
    ) -> None:
        self.model, self.capture, self.labels, self.loss, self.seed = model, capture, labels, loss, seed
        self.reduction, self.loss_name = reduction, losses.name_of(loss)
        self.mode = "train" if model.training else "eval"
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = {n: w for n, m in capture.layers.items() if (w := own_weight(m)) is not None}
        self.frozen = [name for name, weight in self.weights.items() if not weight.requires_grad]  # before all do
        self.computed: dict[str, list[Tensor]] = {}  # the other weights, as the current batch's forward pass used them
        self.computed_norms: dict[str, Norms] = {}
        # A weight that is computed (parametrizations, hooks) is no leaf; what it is computed from is among these.
        computed = len(self.weights) < len(capture.layers) or not self.weights
        self.inputs = [*self.weights.values(), *(model.parameters() if computed else ())]
        self.weight_grads: dict[str, Tensor] = {}
        self.samples, self.batches, self.total_loss, self.sees_loss = 0, 0, 0.0, False
        self.loss_dtype: torch.dtype | None = None
        self.masked = self.targets = 0  # labels that the loss leaves out, and all
        self.random_signs = False

    def one(self, x: Any, y: Any) -> None:
        """One batch: a forward pass and the backward passes that the labels ask for."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        x = on_device(x, device)
        count = batch_size(x)
        self.capture.begin(count, scale=float(count))
        self.samples, self.batches = self.samples + count, self.batches + 1
        if not count:
            return  # the end of a set that a sampler or filter left empty
        self.capture.gradients = False  # of passes within the forward pass or the loss: forces, a penalty on slopes
        output = self._forward(x)
        logits = losses.logits_of(output)
        y = on_device(y, logits.device if isinstance(logits, Tensor) else device)  # of a split model, its last part's
        if self.loss is None and losses.own_loss_of(output) is not None:
            self.loss_name = "output.loss"
        value = None
        if y is not None or self.labels == "data":
            value = losses.mean_loss(self.loss, output, y, count, self.reduction)
        masked, targets = losses.masked_labels(self.loss, y)
        self.masked, self.targets = self.masked + masked, self.targets + targets
        if self.labels != "data":
            self._from_model(output, y, value)
        if value is not None:
            self._from_data(value, count)

    def _forward(self, x: Any) -> Any:
        self.computed.clear()
        layers = {name: m for name, m in self.capture.layers.items() if name not in self.weights}
        handles = [watch_computed(module, partial(self._note_computed, name)) for name, module in layers.items()]
        for name, attention in self.capture.attentions.items():
            handles += watch_computed_inside(attention, partial(self._note_inside, name))
            handles.append(watch_beside(attention, partial(self._note_inside, name)))
        try:
            return call(self.model, x)
        finally:
            remove(handles)

    def _note_inside(self, name: str, local: str, weight: Tensor) -> None:
        if (layer := f"{name}.{local}".lstrip(".")) in self.capture.layers:
            self._note_computed(layer, weight)

    def _note_computed(self, name: str, weight: Tensor | None) -> None:
        if weight is None or not weight.is_floating_point():
            return
        held = self.computed.setdefault(name, [])
        if all(weight is not other for other in held):  # one that is computed once for several calls has one gradient
            held.append(weight)
        if name not in self.computed_norms:
            with torch.no_grad():
                self.computed_norms |= norms_of(self.capture.layers, {name: weight})

    def _from_model(self, output: Any, y: Any, value: Tensor | None) -> None:
        logits = losses.logits_of(output)
        asked = f"labels={self.labels!r}"
        kind = label_models.checked_distribution(self.loss, logits, asked, samples=self.capture.batch)
        axis = label_models.class_axis(kind, output, logits, y)
        counted = None
        if kind in label_models.SOFTMAX:
            holds_own = self.loss is None and losses.own_loss_of(output) is not None
            own = losses.mean_loss(None, output, y, self.capture.batch, self.reduction) if holds_own else None
            label_models.check_softmax(own, logits, axis, asked)
            counted = self._counted(value, logits, axis, y, own=holds_own)
        self.capture.gradients, self.loss_dtype = True, torch.promote_types(logits.dtype, torch.float32)
        if self.labels == "sample":
            self._backward(logits, label_models.drawn_gradient(kind, logits, self.generator, axis, counted))
        else:
            if (passes := logits[0].numel()) > MANY:
                warnings.warn(
                    f"labels='model' takes a backward pass a class and label, {passes:,} a batch here; "
                    "labels='sample' takes one",
                    stacklevel=4,
                )
            signals = label_models.weighted_gradients(kind, logits, axis, counted)
            interact = samples_interact(self.model) or self.capture.functions.batch_statistics
            if interact and logits.numel() <= label_models.ONE_BY_ONE:
                signals = label_models.gradients_one_by_one(signals)
            else:
                self.random_signs = self.random_signs or interact
                signals = label_models.with_random_signs(signals, self.generator)
            for c, signal in enumerate(signals):
                self.capture.further = c > 0
                self._backward(logits, signal)
        self.capture.gradients = self.capture.further = False

    def _counted(self, value: Tensor | None, logits: Tensor, axis: int, y: Any, *, own: bool) -> Tensor | None:
        """Which outputs have a part in the loss; for a loss of torch's however confident the network is."""
        if value is None or own:
            return label_models.counted_outputs(value, logits, axis)
        unsure = label_models.unsure(logits, axis)
        value = losses.mean_loss(self.loss, unsure, y, self.capture.batch, self.reduction)
        return label_models.counted_outputs(value, unsure, axis)

    def _from_data(self, value: Tensor, count: int) -> None:
        self.total_loss, self.sees_loss = self.total_loss + float(value.detach()) * count, True
        if self.labels == "data":
            self.capture.gradients, self.loss_dtype = True, value.dtype
        grads = self._backward(value, keep=False)
        self.capture.gradients = False
        for name, grad in grads.items():
            held = self.weight_grads.get(name)
            self.weight_grads[name] = widened(grad) * count if held is None else held.add_(grad, alpha=count)

    def _backward(self, value: Tensor, signal: Tensor | None = None, *, keep: bool = True) -> dict[str, Tensor]:
        """Gradients of the weights, without touching any .grad; the capture's hooks see the rest."""
        used = {name: [weight] for name, weight in self.weights.items()} | self.computed
        inputs = [p for p in [*self.inputs, *chain(*self.computed.values())] if p.requires_grad]
        if not inputs or not value.requires_grad:
            raise ValueError(losses.NOTHING)
        grads = torch.autograd.grad(value, inputs, signal, retain_graph=keep, allow_unused=True)
        found = {id(p): grad for p, grad in zip(inputs, grads, strict=True) if grad is not None}
        of_weights = {name: [found[id(w)] for w in weights if id(w) in found] for name, weights in used.items()}
        return {name: _sum(grads) for name, grads in of_weights.items() if grads}

    def _softmax(self) -> bool | None:
        """Whether the gradients are a softmax cross-entropy's; None: not known."""
        kind = label_models.distribution_of(self.loss)
        own = self.labels == "data" and self.loss_name == "output.loss"
        return None if own or kind is None else kind in label_models.SOFTMAX

    def _mean(self) -> bool:
        """Whether the gradients are those of a mean over a sample's labels, too."""
        return self.labels == "data" and (self.reduction or losses.reduction_of(self.loss)) == "mean"

    def result(self, skipped: Mapping[str, str]) -> Conditioning:
        """The measurement, from everything seen."""
        if not self.batches:
            raise ValueError("batches gave no batch; pass (x, y), or an iterable of such pairs")
        if not self.samples:
            raise ValueError("the batches hold no sample: their leading dimension is 0")
        modules = self.capture.layers
        with torch.no_grad():
            grads = {name: grad / self.samples for name, grad in self.weight_grads.items()}
            norms = norms_of(modules, self.weights) | self.computed_norms, norms_of(modules, grads)
            counted = 1 - self.masked / max(1, self.targets)
            layers, unseen, nonfinite = finish(
                self.capture,
                *norms,
                softmax=self._softmax(),
                mean=self._mean(),
                counted=counted,
                loss_dtype=self.loss_dtype,
            )
        layers |= {name: replace(layers[name], frozen=True) for name in self.frozen if name in layers}
        neurons, uncounted = counts(self.capture.neurons)
        mean = self.total_loss / self.samples
        dtypes = self.capture.dtypes or {torch.get_default_dtype()}
        return Conditioning(
            layers=layers,
            neurons=neurons,
            skipped={**skipped, **unseen, **uncounted},
            mode=self.mode,
            dtype=coarsest(dtypes),
            labels=self.labels,
            random_signs=self.random_signs,
            loss=mean if self.sees_loss and abs(mean) < float("inf") else None,
            loss_name=self.loss_name,
            conv=self.capture.conv,
            bias=self.capture.bias,
            precision=self.capture.precision,
            kappa=self.capture.kappa,
            samples=self.samples,
            batches=self.batches,
            seed=self.seed,
            first_nonfinite=nonfinite,
        )


def _sum(grads: list[Tensor]) -> Tensor:
    return grads[0] if len(grads) == 1 else torch.stack([widened(grad) for grad in grads]).sum(0)


def coarsest(dtypes: set[torch.dtype]) -> str:
    """The dtype with the largest eps, as text."""
    return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")
