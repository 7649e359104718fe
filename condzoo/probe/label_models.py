"""The distribution over labels that a loss stands for, and the gradients of -log p(y | output) under it.

    softmax        cross-entropy, whatever its class weights or label smoothing
    log-softmax    negative log-likelihood of log-probabilities (nn.NLLLoss)
    gaussian       mean squared error: unit variance, coordinates independent
    bernoulli      binary cross-entropy with logits: coordinates independent

The gradients are those of -log p itself, so F does not depend on the loss's weights, smoothing or reduction.
(For K outputs nn.MSELoss is 2 / K, nn.BCEWithLogitsLoss 1 / K of the batch's mean -log p.)
Shapes: n samples, t labels a sample (tokens, pixels; else one), k classes or coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Distribution = Literal["softmax", "log-softmax", "gaussian", "bernoulli"]

SOFTMAX: tuple[Distribution, ...] = ("softmax", "log-softmax")
FUNCTIONS: dict[Any, Distribution] = {
    F.cross_entropy: "softmax",
    F.nll_loss: "log-softmax",
    F.mse_loss: "gaussian",
    F.binary_cross_entropy_with_logits: "bernoulli",
}
MODULES: tuple[tuple[type[nn.Module], Distribution], ...] = (
    (nn.CrossEntropyLoss, "softmax"),
    (nn.NLLLoss, "log-softmax"),
    (nn.MSELoss, "gaussian"),
    (nn.BCEWithLogitsLoss, "bernoulli"),
)
ONE_BY_ONE = 512  # backward passes a batch, up to which each sample's label is a pass of its own under batch statistics
ZERO_SUM = 1e-3  # of its absolute values, that the gradient of a cross-entropy may have as its sum over the classes
OTHERS = "pass loss=nn.MSELoss() or nn.BCEWithLogitsLoss(), or use the labels of the data (labels='data')"
ALLOWED = "cross-entropy (softmax), NLL (log-probabilities), MSE (Gaussian) or BCE with logits (Bernoulli) of torch"


def distribution_of(loss: Any) -> Distribution | None:
    """The distribution of one of torch's losses (None: cross-entropy), None of any other callable."""
    while isinstance(loss, partial):
        loss = loss.func
    if loss is None:
        return "softmax"
    by_class = next((found for kind, found in MODULES if isinstance(loss, kind)), None)
    return by_class or (FUNCTIONS.get(loss) if callable(loss) and loss.__hash__ else None)


def checked_distribution(
    loss: Any, output: Any, asked: str, *, tokens: bool = True, samples: int | None = None
) -> Distribution:
    """The distribution, if the loss has one and the output its shape.

    Args:
        loss, output: of the model.
        asked: what needs it, for the error ("labels='model'").
        tokens: a softmax may be over many labels a sample.
        samples: of the batch, which the output's first dimension must be: of tokens flattened into it, it is not known
            whose they are. None: any.

    Raises:
        ValueError: a free callable, or an output of another shape; says what is allowed.
    """
    found = distribution_of(loss)
    if found is None:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(
            f"{asked} takes labels from the distribution that the loss stands for and needs {ALLOWED}; of {name} "
            "none is known. Pass one of these as loss, or use the labels of the data (labels='data')"
        )
    tensor = isinstance(output, Tensor)
    shape = list(output.shape) if tensor else type(output).__name__
    if found in SOFTMAX and not (tensor and (output.ndim == 2 or (tokens and output.ndim > 2))):
        allowed = "[n, classes] or [n, classes, ...]" if tokens else "[n, classes]"
        raise ValueError(f"{asked} needs logits {allowed}, got {shape}; use the labels of the data (labels='data')")
    if not (tensor and output.ndim and output.is_floating_point()):
        raise ValueError(f"{asked} needs a model output that is a tensor [n, ...], got {shape}")
    if samples is not None and len(output) != samples:
        raise ValueError(
            f"{asked} needs an output whose first dimension is the {samples} samples, got {shape}; return tokens as "
            "[n, classes, ...], not flattened"
        )
    return found


def check_softmax(own: Tensor | None, logits: Tensor, axis: int, asked: str) -> None:
    """See that labels can come from a softmax over the classes.

    Args:
        own: the loss that the model returned, where that is the loss: it need not be a cross-entropy.
        logits: with their classes along `axis`.
        asked: what needs it, for the error.

    Raises:
        ValueError: there is one class, or d own / d logits, a multiple of p - y under a softmax, has another sum
            over the classes than 0.
    """
    if logits.shape[axis] == 1:
        raise ValueError(
            f"{asked} takes labels from a softmax, which has no meaning for one class (logits {list(logits.shape)}); "
            f"{OTHERS}"
        )
    grad = None if own is None else _gradient(own, logits)
    if own is None or grad is None:
        return
    wide = torch.promote_types(grad.dtype, torch.float32)
    rest, size = (float(part.sum(dtype=wide)) for part in (grad.sum(axis, dtype=wide).abs(), grad.abs()))
    # Confident logits leave p - y little but the rounding of p, which is near 1, for each label: the loss may be a sum.
    # Half precision's rounding of a sum would let any loss pass: there it is held to be a mean over the samples.
    eps = torch.finfo(own.dtype).eps
    labels = (logits if eps < ZERO_SUM / 2 else logits[0]).numel() / logits.shape[axis]
    rounding = 4 * eps * labels * _scale(logits.dtype)
    if rest > max(ZERO_SUM, 4 * eps, 4 * torch.finfo(logits.dtype).eps) * size + rounding:
        raise ValueError(f"{asked} takes labels from a softmax, and the model's own loss is no cross-entropy; {OTHERS}")


def class_axis(kind: Distribution, output: Any, logits: Tensor, target: Any) -> int:
    """Which dimension of logits with many labels a sample counts the classes, under a softmax.

    torch's cross-entropy has them second, [n, classes, ...]; the language models of Hugging Face last, [n, tokens,
    classes]. The target's shape decides; where it fits both or is missing, three-dimensional `.logits` of an output
    are taken for a language model's.

    Raises:
        ValueError: nothing decides.
    """
    if logits.ndim <= 2 or kind not in SOFTMAX:
        return 1
    of_language = not isinstance(output, Tensor) and logits.ndim == 3
    shape = target.shape if isinstance(target, Tensor) else None
    if shape == logits.shape:  # a probability for each class, where torch has them
        return 1
    fits_last, fits_second = shape == logits.shape[:-1], shape == logits.shape[:1] + logits.shape[2:]
    if fits_last != fits_second:
        return logits.ndim - 1 if fits_last else 1
    if isinstance(output, Tensor) and not fits_second:
        raise ValueError(
            f"logits {list(logits.shape)} have their classes second or last: pass the targets too, whose shape "
            "decides ([n, ...] without the classes)"
        )
    return logits.ndim - 1 if of_language else 1


def classes_second(logits: Any, target: Any) -> Any:
    """Logits as torch's cross-entropy takes them, [n, classes, ...], where the targets say that theirs are last."""
    if isinstance(logits, Tensor) and isinstance(target, Tensor) and logits.ndim > 2:
        fits_last, fits_second = (target.shape == logits.movedim(axis, -1).shape[:-1] for axis in (-1, 1))
        return logits.movedim(-1, 1) if fits_last and not fits_second else logits
    return logits


def counted_outputs(value: Tensor | None, logits: Tensor, axis: int) -> Tensor | None:
    """1 for logits that the loss looks at, 0 for those of masked tokens (label -100) and others that it leaves out.

    None where there is no loss, or it does not come from these logits: all count then.
    """
    grad = None if value is None else _gradient(value, logits)
    return None if grad is None else (grad != 0).any(axis, keepdim=True).expand_as(grad)


def unsure(logits: Tensor, axis: int) -> Tensor:
    """Logits of the same shape that are sure of no class: a loss's gradients at these do not vanish in any dtype."""
    shape = [-1 if i == axis else 1 for i in range(logits.ndim)]
    ramp = torch.linspace(-1, 0, logits.shape[axis], dtype=logits.dtype, device=logits.device)
    return ramp.reshape(shape).expand(logits.shape).clone().requires_grad_()


def _gradient(value: Tensor, logits: Tensor) -> Tensor | None:
    """d value / d logits times `_scale`; None where it does not come from these logits."""
    if not (value.requires_grad and logits.requires_grad):
        return None
    scale = torch.full_like(value, _scale(logits.dtype))
    return torch.autograd.grad(value, logits, scale, retain_graph=True, allow_unused=True)[0]


def _scale(dtype: torch.dtype) -> float:
    """What keeps gradients of a mean from vanishing in float16; p - y is at most 1."""
    return 2.0**15 if dtype == torch.float16 else 1.0


def _by_label(kind: Distribution, tensor: Tensor, axis: int) -> Float[Tensor, "n t k"]:
    """A sample's labels are independent: t of k classes under a softmax, one of all coordinates else."""
    if kind in SOFTMAX:
        return tensor.movedim(axis, -1).reshape(tensor.shape[0], -1, tensor.shape[axis])
    return tensor.reshape(tensor.shape[0], 1, -1)


def _as_output(kind: Distribution, signal: Float[Tensor, "n t k"], output: Tensor, axis: int) -> Tensor:
    if kind in SOFTMAX:
        shape = output.movedim(axis, -1).shape
        return signal.reshape(shape).movedim(-1, axis).to(output)
    return signal.reshape(output.shape).to(output)


def weighted_gradients(
    kind: Distribution, output: Float[Tensor, n * k], axis: int = 1, counted: Tensor | None = None
) -> Iterator[Float[Tensor, n * k]]:
    """Vectors v_c [n, ...], one a label and class or coordinate, with n^2 sum_c v_c v_c^T = E_y[g g^T] for each sample.

    g = d(-log p)/d output is p - e_c under a softmax, and f - y with variance 1 or s (1 - s) a coordinate.
    The factor 1/n is that of a batch-mean loss.

    Args:
        kind, output: of the model.
        axis: of the classes under a softmax.
        counted: 1 where an output has a part in the loss, 0 where not (masked or last tokens); None: all have.
    """
    f = _by_label(kind, output.detach().to(torch.promote_types(output.dtype, torch.float32)), axis)
    samples, labels, width = f.shape
    if kind == "softmax":
        p = f.softmax(dim=2)
        scale, center = p.sqrt(), p
    elif kind == "log-softmax":
        scale, center = (f / 2).exp(), torch.zeros_like(f)
    else:
        scale = torch.ones_like(f) if kind == "gaussian" else (f.sigmoid() * (-f).sigmoid()).sqrt()
        center = torch.zeros_like(f)
    if counted is not None:
        scale = scale * _by_label(kind, counted.to(f), axis)
    for t, c in itertools.product(range(labels), range(width)):
        vector = center[:, t].clone()
        vector[:, c] -= 1
        signal = torch.zeros_like(f)
        signal[:, t] = scale[:, t, c : c + 1] * vector / samples
        yield _as_output(kind, signal, output, axis)


def gradients_one_by_one(weighted: Iterable[Float[Tensor, n * k]]) -> Iterator[Float[Tensor, n * k]]:
    """Of gradients of all samples at once each sample's alone, zero for the others.

    Under batch statistics a gradient depends on all labels, which are independent: products of two samples' signals
    have no part in the expectation.
    """
    for signal in weighted:
        for n, own in enumerate(signal):
            alone = torch.zeros_like(signal)
            alone[n] = own
            yield alone


def with_random_signs(
    weighted: Iterable[Float[Tensor, n * k]], generator: torch.Generator
) -> Iterator[Float[Tensor, n * k]]:
    """Gradients of all samples at once, each sample's with a random sign.

    Without effect where samples do not interact; under batch statistics it makes the cross terms between
    samples, which independent labels do not have, zero in expectation.
    """
    for signal in weighted:
        shape = (signal.shape[0],) + (1,) * (signal.ndim - 1)
        yield (torch.randint(0, 2, shape, generator=generator, device="cpu").to(signal) * 2 - 1) * signal


def drawn_gradient(
    kind: Distribution,
    output: Float[Tensor, n * k],
    generator: torch.Generator,
    axis: int = 1,
    counted: Tensor | None = None,
) -> Float[Tensor, n * k]:
    """d(-log p(y)) / d output / n for labels y drawn from the distribution; arguments as above.

    NaN where the output is, but for a Gaussian, whose f - y does not depend on it.
    """
    f = _by_label(kind, output.detach().double().cpu(), axis)
    if kind == "gaussian":
        signal = torch.randn(f.shape, generator=generator, dtype=torch.float64, device="cpu")
    else:
        p = f.softmax(dim=2) if kind in SOFTMAX else f.sigmoid()
        drawn = _drawn(kind, torch.where(torch.isfinite(p), p, 0.5), generator)  # torch draws from no NaN
        signal = torch.where(torch.isfinite(p), p if kind != "log-softmax" else 0.0, torch.nan) - drawn
    if counted is not None:
        signal = signal * _by_label(kind, counted.to(signal), axis)
    return _as_output(kind, signal / f.shape[0], output, axis)


def _drawn(kind: Distribution, p: Float[Tensor, "n t k"], generator: torch.Generator) -> Float[Tensor, "n t k"]:
    """Labels of these probabilities: one of k by a one, or 0 and 1 for each."""
    if kind not in SOFTMAX:
        return torch.bernoulli(p, generator=generator)
    drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).reshape(p.shape[:2])
    return F.one_hot(drawn, p.shape[2]).to(p)
