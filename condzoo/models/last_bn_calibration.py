"""Calibration of a last BN that is put into a network: statistics of the head's input, which the head then absorbs.

Shapes: B examples, D features, R rows.
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from condzoo.models.last_bn import ADDED_BIAS

ROUNDING = 0.01  # of the largest output: what may change by float32's or float64's


@dataclass(frozen=True)
class HeadInput:
    """What calibration saw of a head's input, over all rows of all batches.

    Attributes:
        mean, variance: [D]; the variance is the biased one.
        from_dropout: whether every input was, unchanged, what the dropout module in question had just given out, once.
        siblings: the linear layers in question that read the same tensor as the head.
        last: x of the last batch that is not empty.
    """

    mean: Float64[Tensor, "D"]
    variance: Float64[Tensor, "D"]
    from_dropout: bool
    siblings: list[nn.Linear]
    last: Tensor


def inputs(batches: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """x of every batch.

    Raises:
        TypeError: a batch that is not a floating-point tensor.
    """
    for i, batch in enumerate([batches] if isinstance(batches, Tensor) or is_pair(batches) else batches):
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise TypeError(f"batch {i} is {came}; batches are one tensor, or an iterable of x or (x, y)")
        yield x


def is_pair(batches: Any) -> bool:
    """Whether these are x and its labels, one batch, and not two batches."""
    if not isinstance(batches, tuple | list) or len(batches) != 2:
        return False
    x, y = batches
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point() and not y.is_floating_point()


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode, without gradients; modes and random streams are put back."""
    modes = {module: module.training for module in model.modules()}
    cuda = [device] if device.type == "cuda" else []
    # in inference mode tensors have no versions; a shuffling loader draws from the global generator
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            torch.clear_autocast_cache()  # inside the caller's autocast it has the head's weight as it was


@torch.inference_mode(False)
@torch.no_grad()
def watch_head(
    model: nn.Module,
    head: nn.Linear,
    dropout: nn.Module | None,
    batches: Tensor | Iterable[Any],
    others: Sequence[nn.Linear] = (),
) -> HeadInput:
    """Run a model in eval mode and see what its head takes.

    Mean and variance are accumulated batch by batch around the running mean, so that no digits cancel.

    Args:
        dropout: the module that may feed the head; in eval mode it passes its input on.
        others: linear layers that may be heads, too, on the same features.

    Raises:
        ValueError: fewer than 2 rows, or features that are not finite.
    """
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)
    # by the dropout since the head ran last, with its version; held, so that no other takes their memory
    given_out: list[tuple[Tensor, int]] = []
    direct = dropout is not None
    # what head and others read last, with its version; not held: that would take the memory of a training
    read: dict[nn.Module, tuple[weakref.ref[Tensor], int]] = {}
    siblings: set[nn.Module] = set()

    def reads(module: nn.Module, args: tuple) -> None:
        if not args:  # called by a keyword
            return
        read[module] = weakref.ref(args[0]), args[0]._version
        new = [other for other in (others if module is head else [module]) if other in read and head in read]
        siblings.update(other for other in new if same_tensor(read[other], read[head]))

    def gives_out(module: nn.Module, args: tuple, output: Tensor) -> None:
        given_out.append((output, output._version))

    def accumulate(module: nn.Module, args: tuple) -> None:
        nonlocal count, mean, squares, direct
        direct = direct and len(given_out) == 1 and passed_on(*given_out[0], args[0])
        given_out.clear()
        rows = args[0].reshape(-1, args[0].shape[-1]).double()  # [R, D]
        if not len(rows):
            return
        mean, squares = mean.to(rows), squares.to(rows)
        shift, share = rows.mean(0) - mean, rows.shape[0] / (count + rows.shape[0])
        squares = squares + (rows - rows.mean(0)).square().sum(0) + shift.square() * count * share
        mean, count = mean + shift * share, count + rows.shape[0]

    device, last = head.weight.device, torch.empty(0)
    handles = [head.register_forward_pre_hook(accumulate)]
    handles += [layer.register_forward_pre_hook(reads) for layer in (*others, head)]
    if dropout is not None:
        handles.append(dropout.register_forward_hook(gives_out))
    try:
        with evaluating(model, device):
            for x in inputs(batches):
                x = x.to(device, copy=x.is_inference())
                model(x)
                last = x if x.numel() else last
    finally:
        for handle in handles:
            handle.remove()
    if count < 2:
        raise ValueError(f"calibration needs at least 2 examples, got {count}; pass more batches, or None")
    if not (mean.isfinite().all() and squares.isfinite().all()):
        raise ValueError("the input of the head is not finite on these batches; check the data and the weights")
    return HeadInput(mean, squares / count, direct, [other for other in others if other in siblings], last)


def same_tensor(a: tuple[weakref.ref[Tensor], int], b: tuple[weakref.ref[Tensor], int]) -> bool:
    """Whether both still exist and are the same memory, unchanged in place between their versions."""
    x, y = a[0](), b[0]()
    if x is None or y is None or not x.numel():
        return False
    return a[1] == b[1] and (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


def passed_on(output: Tensor, version: int, x: Tensor) -> bool:
    """Whether x has all the rows of D features of `output`, unchanged in place since its `version`."""
    same = output.data_ptr() == x.data_ptr() and output.numel() == x.numel() and x._version == version
    rows = (output.shape[-1], output.stride(-1)) == (x.shape[-1], x.stride(-1))
    return same and (rows or is_pooled(output, x.shape[-1]))


def is_pooled(x: Tensor, d: int) -> bool:
    """Whether x is a pooled map of d channels that is not flattened: [B, D, 1, 1]."""
    return x.ndim > 2 and x.shape[1] == x.shape[1:].numel() == d


def refuse_fixed(model: nn.Module, head: nn.Linear) -> None:
    """Reject a head that nothing can be written into.

    Raises:
        ValueError: weight or bias is made anew from other parameters in each forward pass, or is another module's, too.
    """
    for name in ("weight", "bias"):
        value = getattr(head, name)
        if value is None:
            continue
        if name not in head._parameters:
            raise ValueError(
                f"the head's {name} is computed from other parameters (pruning, weight norm ...), so it cannot absorb "
                "the statistics; make it plain first (prune.remove, remove_weight_norm), or leave out the batches"
            )
        others = {n or type(model).__name__: m for n, m in model.named_modules() if m is not head}
        if users := [n for n, m in others.items() if any(value is p for p in m._parameters.values())]:
            raise ValueError(
                f"the head's {name} is also that of {users[0]!r}, so it cannot absorb the statistics; untie it "
                f"(head.{name} = nn.Parameter(head.{name}.detach().clone())), or leave out the batches"
            )


@torch.no_grad()
def standardize_(last_bn: nn.BatchNorm1d, head: nn.Linear, seen: HeadInput) -> None:
    """Give the last BN the statistics of its input and let the head absorb them: W x + b = (W sigma) y + (b + W mu)."""
    last_bn.running_mean.copy_(seen.mean)  # type: ignore[union-attr]
    last_bn.running_var.copy_(seen.variance)  # type: ignore[union-attr]
    # from the rounded statistics: those are what the BN will divide by
    mu, sigma = last_bn.running_mean.double(), (last_bn.running_var.double() + last_bn.eps).sqrt()  # type: ignore[union-attr]
    weight = head.weight.double()
    shift = weight @ mu
    if head.bias is None:
        head.bias = nn.Parameter(shift.to(head.weight))
        setattr(head, ADDED_BIAS, True)
    else:
        head.bias.copy_(head.bias.double() + shift)
    head.weight.copy_(weight * sigma)


@torch.no_grad()
def put_back_(head: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """The head as it was before `standardize_`."""
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)
    elif hasattr(head, ADDED_BIAS):
        head.bias = None  # type: ignore[assignment]
        delattr(head, ADDED_BIAS)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The floating-point tensors that a model returns in eval mode."""
    with evaluating(model, x.device):
        return [t for t in tensors_in(model(x)) if t.is_floating_point()]


def rounding(weight: Tensor, returned: Iterable[Tensor]) -> float:
    """What share of the largest output rounding may change: of weight, outputs or autocast, whichever is coarsest."""
    dtypes = {weight.dtype, *(t.dtype for t in returned)}
    if torch.is_autocast_enabled(weight.device.type):
        dtypes.add(torch.get_autocast_dtype(weight.device.type))
    return max(ROUNDING, *(4 * torch.finfo(dtype).eps ** 0.5 for dtype in dtypes))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an output, also inside dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def largest_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Over all outputs: how far one is from what it was, over the largest of its tensor; NaN counts as infinite."""
    pairs = [(a.double(), b.double(), a.isfinite()) for a, b in zip(before, after, strict=False) if a.shape == b.shape]
    finite = [(a[known], b[known]) for a, b, known in pairs if known.any()]
    top = max((float(a.abs().max()) for a, _ in finite), default=0.0)
    changes = [0.0]
    for a, b in finite:
        scale = max(float(a.abs().max()), 1e-3 * top)  # a tensor of round-off alone is no measure
        change = float((b - a).abs().max())
        changes.append(change if change == 0 else change / scale if scale else math.inf)
    return math.inf if any(map(math.isnan, changes)) else max(changes)
