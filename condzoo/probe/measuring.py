"""`measure`: every layer's conditioning, from forward and backward passes over batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.probe import losses
from condzoo.probe.arithmetic import PRECISIONS
from condzoo.probe.capture import Capture, capture_of
from condzoo.probe.conditioning import Conditioning
from condzoo.probe.finishing import finish
from condzoo.probe.layers import CONVS, choose
from condzoo.probe.losses import LABELS, Labels, Loss
from condzoo.probe.preserving import preserved
from condzoo.probe.weights import largest_singular_values, own_weight

Adapter = Callable[[Any], tuple[Any, Any]]


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: str = "data",
    loss: Loss | None = None,
    layers: Sequence[str] | None = None,
    conv: str = "channels",
    device: str | torch.device | None = None,
    precision: str = "auto",
    seed: int = 0,
    bias: bool = False,
    adapter: Adapter | None = None,
) -> Conditioning:
    """Measure the conditioning of every linear and convolution layer of any network.

    The model is measured in the mode it is in (train mode uses batch statistics) and is left bitwise as
    it was: parameters, buffers, .grad, requires_grad, mode, hooks, random streams. Memory does not grow
    with the number of batches.

    Args:
        model: any module.
        batches: (x, y) pairs, for example a DataLoader, or one pair. x is a tensor, or a dict or tuple of
            the model's arguments.
        labels: whose labels the gradients have: "data" (M's factor), "model" (F's: the exact expectation
            over the softmax, one backward pass a class) or "sample" (F's: one draw from the softmax).
        loss: callable of (output, y), mean or, with `.reduction == "sum"`, sum over the batch; or one
            number a sample. None: cross-entropy.
        layers: names or shell patterns ("layer4.*"); None measures all.
        conv: "channels": every position of a feature map is a row; "patches": every patch is (K-FAC).
        device: where to measure; None: where the model is. Elsewhere a copy of the model is used.
        precision: of products: "float64", "fast" (float32, summed in float64), or "auto": fast, and
            float64 at once for a layer whose spectrum reaches under fast's noise floor.
        seed: of dropout and of label draws.
        bias: add a constant 1 to the inputs of layers that have a bias.
        adapter: turns one of `batches` into (x, y), where they are not pairs.

    Returns:
        A `Conditioning`: layer name to `LayerConditioning`, in forward order.

    Raises:
        ValueError: an unknown option or layer name, no batches, or labels that the loss cannot give.

    Source: arXiv:2002.10801, sec. 3.
    """
    whose: Labels = checked("labels", labels, LABELS)
    chosen, skipped = choose(model, layers)
    if device is not None and any(p.device != torch.device(device) for p in model.parameters()):
        model = copy.deepcopy(model).to(device)
        chosen, skipped = choose(model, layers)
    capture = capture_of(model, chosen)
    capture.bias = bias
    capture.conv, capture.precision = checked("conv", conv, CONVS), checked("precision", precision, PRECISIONS)
    run = _Run(model, capture, whose, loss, seed)
    with preserved(model, seed), torch.inference_mode(False), torch.enable_grad():
        capture.attach()
        try:
            for batch in _each(batches):
                run.one(*(adapter or _pair)(batch))
        finally:
            capture.detach()
    return run.result(skipped)


def checked(name: str, value: str, allowed: Sequence[str]) -> Any:
    """The value if it is allowed, else a ValueError that names the closest."""
    if value not in allowed:
        close = get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
    return value


class _Run:
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


def _each(batches: Iterable[Any]) -> Iterator[Any]:
    one_pair = isinstance(batches, (tuple, list)) and len(batches) == 2 and isinstance(batches[0], (Tensor, dict))
    return iter([batches] if one_pair else batches)


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise TypeError(f"a batch must be a pair (x, y), got a {got}; pass adapter=lambda batch: (x, y)")
    return batch[0], batch[1]


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
