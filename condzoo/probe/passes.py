"""Forward and backward passes over batches, for a capture to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.probe import losses
from condzoo.probe.capture import Capture
from condzoo.probe.conditioning import Conditioning
from condzoo.probe.finishing import finish
from condzoo.probe.losses import Labels, Loss
from condzoo.probe.weights import largest_singular_values, own_weight


class Passes:
    """The state of one measurement: the capture's sums, the mean weight gradients and the mean loss."""

    def __init__(self, model: nn.Module, capture: Capture, labels: Labels, loss: Loss | None, seed: int) -> None:
        self.model, self.capture, self.labels, self.loss, self.seed = model, capture, labels, loss, seed
        self.mode = "train" if model.training else "eval"
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = {n: w for n, m in capture.layers.items() if (w := own_weight(m)) is not None}
        self.weight_grads: dict[str, Tensor] = {}
        self.samples, self.batches, self.total_loss = 0, 0, 0.0

    def one(self, x: Any, y: Any) -> None:
        """One batch: a forward pass and the backward passes that the labels ask for."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        x, y = _to(x, device), _to(y, device)
        count = self.capture.batch = batch_size(x)
        self.capture.scale = float(count)
        self.samples, self.batches = self.samples + count, self.batches + 1
        output = _call(self.model, x)
        logits = losses.logits_of(output)
        self.capture.gradients = self.labels == "data"
        if self.labels != "data":
            losses.check_categorical(self.loss, logits, self.labels)
            self._from_model(logits)
        if y is not None:
            self._from_data(losses.mean_loss(self.loss, output, y, count), count)

    def _from_model(self, logits: Tensor) -> None:
        self.capture.gradients = True
        if self.labels == "sample":
            drawn = losses.drawn_labels(logits, self.generator)
            self._backward(nn.functional.cross_entropy(logits, drawn))
        else:
            for c, signal in enumerate(losses.class_gradients(logits, self.generator)):
                self.capture.further = c > 0
                self._backward(logits, signal)
        self.capture.gradients = self.capture.further = False

    def _from_data(self, value: Tensor, count: int) -> None:
        self.total_loss += float(value.detach()) * count
        for name, grad in self._backward(value, keep=False).items():
            held = self.weight_grads.get(name)
            self.weight_grads[name] = grad * count if held is None else held.add_(grad, alpha=count)

    def _backward(self, value: Tensor, signal: Tensor | None = None, *, keep: bool = True) -> dict[str, Tensor]:
        """Gradients of the weights, without touching any .grad; the capture's hooks see the rest."""
        inputs = list(self.weights.values()) or [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(value, inputs, signal, retain_graph=keep, allow_unused=True)
        return {n: g for n, g in zip(self.weights, grads, strict=False) if g is not None}

    def result(self, skipped: Mapping[str, str]) -> Conditioning:
        """The measurement, from everything seen."""
        if not self.batches:
            raise ValueError("batches gave no batch; pass (x, y), or an iterable of such pairs")
        modules = self.capture.layers
        with torch.no_grad():
            grads = {name: grad / self.samples for name, grad in self.weight_grads.items()}
            tops = largest_singular_values(modules, self.weights), largest_singular_values(modules, grads)
            layers, unseen, nonfinite = finish(self.capture, *tops)
        mean = self.total_loss / self.samples
        dtypes = self.capture.dtypes or {torch.get_default_dtype()}
        return Conditioning(
            layers=layers,
            neurons={name: n.count() for name, n in self.capture.neurons.items()},
            skipped={**skipped, **unseen},
            mode=self.mode,
            dtype=coarsest(dtypes),
            labels=self.labels,
            loss=mean if self.weight_grads and abs(mean) < float("inf") else None,
            loss_name=losses.name_of(self.loss),
            conv=self.capture.conv,
            bias=self.capture.bias,
            precision=self.capture.precision,
            samples=self.samples,
            batches=self.batches,
            seed=self.seed,
            first_nonfinite=nonfinite,
        )


def coarsest(dtypes: set[torch.dtype]) -> str:
    """The dtype with the largest eps, as text."""
    return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def batch_size(x: Any) -> int:
    """Samples in a batch: the leading dimension of the first tensor in it.

    Raises:
        TypeError: there is no tensor in it.
    """
    if isinstance(x, Tensor) and x.ndim:
        return x.shape[0]
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.ndim:
            return part.shape[0]
    raise TypeError(f"a batch must hold a tensor with a leading batch dimension, got {type(x).__name__}")


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(v, device) for v in value)
    return value
