"""Calibration of a last BN that is put into a network: statistics of the head's input, which the head then absorbs.

Shapes: B examples, D features, R rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from condzoo.models.last_bn import ADDED_BIAS


@dataclass(frozen=True)
class HeadInput:
    """What calibration saw of a head's input, over all rows of all batches.

    Attributes:
        mean, variance: [D]; the variance is the biased one.
        from_dropout: whether every input was, unchanged, what the dropout module in question had just given out, once.
    """

    mean: Float64[Tensor, "D"]
    variance: Float64[Tensor, "D"]
    from_dropout: bool


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


@torch.inference_mode(False)  # in which tensors have no versions
@torch.no_grad()
def watch_head(
    model: nn.Module, head: nn.Linear, dropout: nn.Module | None, batches: Tensor | Iterable[Any]
) -> HeadInput:
    """Run a model in eval mode and see what its head takes.

    Mean and variance are accumulated batch by batch around the running mean, so that no digits cancel.

    Args:
        dropout: the module that may feed the head; in eval mode it passes its input on.

    Raises:
        ValueError: fewer than 2 rows, or features that are not finite.
    """
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)
    # by the dropout since the head ran last, with its version; held, so that no other takes their memory
    given_out: list[tuple[Tensor, int]] = []
    direct = dropout is not None

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

    device = head.weight.device
    modes = {module: module.training for module in model.modules()}
    handles = [head.register_forward_pre_hook(accumulate)]
    if dropout is not None:
        handles.append(dropout.register_forward_hook(gives_out))
    # a shuffling loader draws from the global generator
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            for x in inputs(batches):
                model(x.to(device, copy=x.is_inference()))
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training
    if count < 2:
        raise ValueError(f"calibration needs at least 2 examples, got {count}; pass more batches, or None")
    if not (mean.isfinite().all() and squares.isfinite().all()):
        raise ValueError("the input of the head is not finite on these batches; check the data and the weights")
    return HeadInput(mean, squares / count, direct)


def passed_on(output: Tensor, version: int, x: Tensor) -> bool:
    """Whether x has all the rows of D features of `output`, unchanged in place since its `version`."""
    same = output.data_ptr() == x.data_ptr() and output.numel() == x.numel() and x._version == version
    rows = (output.shape[-1], output.stride(-1)) == (x.shape[-1], x.stride(-1))
    return same and (rows or is_pooled(output, x.shape[-1]))


def is_pooled(x: Tensor, d: int) -> bool:
    """Whether x is a pooled map of d channels that is not flattened: [B, D, 1, 1]."""
    return x.ndim > 2 and x.shape[1] == x.shape[1:].numel() == d


@torch.no_grad()
def standardize_(last_bn: nn.BatchNorm1d, head: nn.Linear, seen: HeadInput) -> None:
    """Give the last BN the statistics of its input and let the head absorb them: W x + b = (W sigma) y + (b + W mu).

    Raises:
        ValueError: weight or bias is made anew from other parameters in each forward pass.
    """
    computed = [name for name in ("weight", "bias") if getattr(head, name) is not None and name not in head._parameters]
    if computed:
        raise ValueError(
            f"the head's {computed[0]} is computed from other parameters (pruning, weight norm ...), so it cannot "
            "absorb the statistics; make it plain first (prune.remove, remove_weight_norm), or leave out the batches"
        )
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
