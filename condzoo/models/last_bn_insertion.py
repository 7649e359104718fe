"""Insert a last BN into a network that has none: any timm or torchvision classifier with one linear head.

The layer is `model.last_bn`, applied to the head's input by a forward pre-hook; the network's own modules and
state-dict keys stay as they are.
Shapes: B examples, D features, K classes, R rows.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.models.last_bn import (
    accept_plain_weights,
    build_last_bn,
    check_batch,
    check_module,
    reset_to_identity_,
)

# where torchvision's models, and most others without timm's get_classifier, keep their head
HEAD_NAMES = ("fc", "classifier", "heads", "head", "last_linear")
DROPOUT_NAMES = ("head_drop", "head_dropout", "drop", "dropout")


def insert_last_bn(model: nn.Module, batches: Tensor | Iterable[Any] | None = None) -> nn.Module:
    """Put a BatchNorm1d before the last linear layer, in place, without changing the function in eval mode.

    The head's input [B, ..., D] is normalized over its last dimension, before a dropout module that directly
    feeds the head (so timm's `forward_head(pre_logits=True)` still returns what comes before it). timm's
    `get_classifier` and `reset_classifier` go on working (the last BN stays), and so
    does loading the network's plain weights. A head put in by hand (`model.fc = ...`) does not get the last BN.

    Copies, pickles, `torch.export`, `torch.compile`, DDP and `torch.func` take it along, each with its own. What does
    not know hooks does not: torch.jit.script refuses the model, nn.DataParallel on several devices stops at an
    error, and a graph of torch.fx (torchvision's create_feature_extractor) has the function, but the original model's
    last BN behind it, which is none of the graph's own layers and parameters. In the zoo's `_lastbn` networks it is a
    layer like others.

    Args:
        model: a classifier of timm or torchvision, or any other module whose last layer is an nn.Linear.
        batches: calibration data: one tensor, or an iterable of x or (x, y). None makes the last BN the identity.
            With it, the last BN takes mean and variance of the head's input over all batches (each example
            weighs the same; the variance is the biased one) and the head's weight and bias absorb them: its
            input is standardized and the logits are the same. A head without a bias gets one.

    Returns:
        `model`, with `model.last_bn`.

    Raises:
        ValueError: the model already has a last BN, has no single linear head, applies a functional dropout
            before it, or is an nn.Sequential; fewer than 2 examples or features that are not finite; with batches,
            a head whose weight or bias is no parameter.
        TypeError: a model that is no module; a batch that is not a floating-point tensor.

    Source: arXiv:2002.10801, sec. 5.
    """
    check_module(model)
    if isinstance(getattr(model, "last_bn", None), nn.Module):
        raise ValueError(f"this {type(model).__name__} already has a last BN, model.last_bn; it takes only one")
    if isinstance(model, nn.Sequential | nn.ModuleList):
        raise ValueError("an nn.Sequential would run model.last_bn as its last layer; wrap it in a module of its own")
    head = find_head(model)
    refuse_functional_dropout(model, head)
    last_bn = reset_to_identity_(build_last_bn(head.in_features).to(head.weight))
    if batches is not None:
        mean, variance = input_statistics(model, head, batches)
        standardize_(last_bn, head, mean, variance)
    model.last_bn = last_bn.train(model.training)
    attach(model, head)
    accept_plain_weights(model)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier = partial(reset_classifier, model)  # type: ignore[assignment]
    return model


def find_head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a classifier: by timm's get_classifier, torchvision's names, or as the last layer.

    Raises:
        ValueError: no head, more than one, or one that ends in another layer.
    """
    name, classifier = type(model).__name__, find_classifier(model)
    if isinstance(classifier, tuple | list | nn.ModuleList):
        raise ValueError(f"{name} has {len(classifier)} heads; a last BN needs one linear head")
    layers = [m for m in classifier.modules() if any(True for _ in m.parameters(recurse=False))]
    if not layers:
        raise ValueError(f"{name} has no classifier (num_classes=0?); a last BN needs one linear head")
    classes = getattr(model, "num_classes", None)
    heads = [m for m in layers if isinstance(m, nn.Linear) and m.out_features == classes]
    if len(heads) > 1 and classifier is not model:
        raise ValueError(f"{name} has {len(heads)} heads; a last BN needs one linear head")
    if not isinstance(layers[-1], nn.Linear):
        raise ValueError(f"the head of {name} ends in {layers[-1]}; a last BN needs one linear head")
    return layers[-1]


def find_classifier(model: Any) -> Any:
    """The module that holds the head, or timm's tuple of them; the model itself where nothing names it."""
    if hasattr(model, "get_classifier"):
        return model.get_classifier()
    named = [getattr(model, name, None) for name in HEAD_NAMES]
    return next((m for m in named if isinstance(m, nn.Module)), model)


def feeding_dropout(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The nn.Dropout whose output `head` takes.

    That is the module right before it among its siblings, or, in a timm model, the sibling with one of timm's
    names for it; none where a second head (`aux_head`, timm's volo) reads its output, too.
    """
    if isinstance(getattr(model, "aux_head", None), nn.Module):
        return None
    for parent in model.modules():
        siblings = list(parent.children())
        if not any(child is head for child in siblings):
            continue
        before = next((a for a, b in pairwise(siblings) if b is head), None)
        named = [getattr(parent, name, None) for name in DROPOUT_NAMES if hasattr(model, "get_classifier")]
        return next((m for m in (before, *named) if isinstance(m, nn.Dropout)), None)
    return None


def drops_by_call(model: Any, head: nn.Linear) -> bool:
    """Whether a timm model drops the head's input by a function call, which nothing can be put before."""
    rate = getattr(model, "drop_rate", 0.0)
    return bool(hasattr(model, "get_classifier") and rate and feeding_dropout(model, head) is None)


def refuse_functional_dropout(model: nn.Module, head: nn.Linear) -> None:
    """Reject a model that drops features by a function call.

    Raises:
        ValueError: `drop_rate` above 0 and no dropout module before the head.
    """
    if drops_by_call(model, head):
        raise ValueError(
            f"{type(model).__name__} applies its dropout (drop_rate={model.drop_rate}) by a function call, so a last "
            "BN would come after it; build it with drop_rate=0"
        )


def attach(model: Any, head: nn.Module) -> None:
    """Hook `model.last_bn` before the head, or before the dropout that feeds it; `model.last_bn_hook` removes it."""
    site = feeding_dropout(model, head) or head
    # partial of a module-level function: copy and pickle carry it along with the copy. It looks for model.last_bn
    # when it runs: another may stand there by then (convert_sync_batchnorm).
    hook = partial(normalize_input, model, isinstance(head, nn.Linear))
    model.last_bn_hook = site.register_forward_pre_hook(hook)


def normalize_input(model: Any, linear_head: bool, module: nn.Module, args: tuple) -> tuple | None:
    """The hook: last BN over the last dimension of a layer's input [B, ..., D], or over D of a pooled [B, D, 1, 1].

    Without a linear head (`num_classes=0`) an unpooled map passes it by.

    Raises:
        RuntimeError: in a copy of the model by nn.DataParallel.
        ValueError: one example in training mode.
    """
    if getattr(module, "_is_replica", False):  # its hook is the original's, and so would be its last BN
        raise RuntimeError(
            "a last BN put in by insert_last_bn does not work under nn.DataParallel, whose copies of the model all "
            "use the first device's; use DistributedDataParallel, or a network that is built with it (resnet50_lastbn)"
        )
    last_bn, (x, *rest) = model.last_bn, args
    pooled = x.ndim > 2 and x.shape[1] == x[0].numel() == last_bn.num_features  # flattened after this dropout
    if not linear_head and x.ndim != 2 and not pooled:
        return None
    rows = x.flatten(1) if pooled else x.reshape(-1, x.shape[-1])
    check_batch(rows, last_bn)
    return (last_bn(rows).reshape(x.shape), *rest)


def reset_classifier(model: Any, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """timm's reset_classifier, after which the last BN stands before the new head (or none: num_classes=0)."""
    type(model).reset_classifier(model, num_classes, *args, **kwargs)
    head = find_head(model) if num_classes else model.get_classifier()
    if isinstance(head, nn.Linear) and head.in_features != model.last_bn.num_features:
        model.last_bn = reset_to_identity_(build_last_bn(head.in_features).to(head.weight)).train(model.training)
    model.last_bn_hook.remove()
    attach(model, head)


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


@torch.no_grad()
def input_statistics(model: nn.Module, layer: nn.Linear, batches: Tensor | Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a layer's input over all rows of all batches, in eval mode.

    Returns:
        two float64 [D], accumulated batch by batch around the running mean, so that no digits cancel.

    Raises:
        ValueError: fewer than 2 rows, or features that are not finite.
    """
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)

    def accumulate(module: nn.Module, args: tuple) -> None:
        nonlocal count, mean, squares
        rows = args[0].reshape(-1, args[0].shape[-1]).double()  # [R, D]
        mean, squares = mean.to(rows), squares.to(rows)
        shift, share = rows.mean(0) - mean, rows.shape[0] / (count + rows.shape[0])
        squares = squares + (rows - rows.mean(0)).square().sum(0) + shift.square() * count * share
        mean, count = mean + shift * share, count + rows.shape[0]

    device = layer.weight.device
    modes = {module: module.training for module in model.modules()}
    handle = layer.register_forward_pre_hook(accumulate)
    # a shuffling loader draws from the global generator
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            for x in inputs(batches):
                model(x.to(device))
        finally:
            handle.remove()
            for module, training in modes.items():
                module.training = training
    if count < 2:
        raise ValueError(f"calibration needs at least 2 examples, got {count}; pass more batches, or None")
    if not (mean.isfinite().all() and squares.isfinite().all()):
        raise ValueError("the input of the head is not finite on these batches; check the data and the weights")
    return mean, squares / count


@torch.no_grad()
def standardize_(last_bn: nn.BatchNorm1d, head: nn.Linear, mean: Tensor, variance: Tensor) -> None:
    """Give the last BN these statistics and let the head absorb them: W x + b = (W sigma) y + (b + W mu).

    Raises:
        ValueError: weight or bias is made anew from other parameters in each forward pass.
    """
    computed = [name for name in ("weight", "bias") if getattr(head, name) is not None and name not in head._parameters]
    if computed:
        raise ValueError(
            f"the head's {computed[0]} is computed from other parameters (pruning, weight norm ...), so it cannot "
            "absorb the statistics; make it plain first (prune.remove, remove_weight_norm), or leave out the batches"
        )
    last_bn.running_mean.copy_(mean)  # type: ignore[union-attr]
    last_bn.running_var.copy_(variance)  # type: ignore[union-attr]
    # from the rounded statistics: those are what the BN will divide by
    mu, sigma = last_bn.running_mean.double(), (last_bn.running_var.double() + last_bn.eps).sqrt()  # type: ignore[union-attr]
    weight = head.weight.double()
    shift = weight @ mu
    if head.bias is None:
        head.bias = nn.Parameter(shift.to(head.weight))
    else:
        head.bias.copy_(head.bias.double() + shift)
    head.weight.copy_(weight * sigma)
