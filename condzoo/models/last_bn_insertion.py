"""Insert a last BN into a network that has none: any timm or torchvision classifier with one linear head.

The layer is `model.last_bn`, applied to the head's input by a forward pre-hook; the network's own modules and
state-dict keys stay as they are.
Shapes: B examples, D features, K classes.
"""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from condzoo.models.last_bn import (
    accept_plain_weights,
    build_last_bn,
    check_batch,
    check_module,
    reset_to_identity_,
)
from condzoo.models.last_bn_calibration import (
    HeadInput,
    is_pooled,
    largest_change,
    outputs,
    put_back_,
    refuse_fixed,
    rounding,
    standardize_,
    watch_head,
)
from condzoo.models.last_bn_heads import find_head, parent_of, possible_heads, refuse_several, refuse_sibling

DROPOUT_NAMES = ("head_drop", "head_dropout", "drop", "dropout")
LIBRARIES = ("timm", "torchvision")  # whose classifiers run their dropout and head in the order they are registered


def insert_last_bn(model: nn.Module, batches: Tensor | Iterable[Any] | None = None) -> nn.Module:
    """Put a BatchNorm1d before the last linear layer, in place, without changing the function in eval mode.

    The head's input [B, ..., D] is normalized over its last dimension, before a dropout module that directly
    feeds the head (so timm's `forward_head(pre_logits=True)` still returns what comes before it); in a network of
    no library only batches show that it does, and without them the last BN stands after it. timm's
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
            input is standardized and the logits are the same. A head without a bias gets one, which plain weights, as
            they have none, set to zero.

    Returns:
        `model`, with `model.last_bn`.

    Raises:
        ValueError: the model already has a last BN, has no single linear head, applies a functional dropout
            before it, is an nn.Sequential, or is compiled or wrapped (DDP); fewer than 2 examples or features that are
            not finite; with batches, a head whose weight or bias is no parameter of its own, or outputs that change.
        TypeError: a model that is no module; a batch that is not a floating-point tensor.

    Source: arXiv:2002.10801, sec. 5.
    """
    check_module(model)
    if isinstance(getattr(model, "last_bn", None), nn.Module):
        raise ValueError(f"this {type(model).__name__} already has a last BN, model.last_bn; it takes only one")
    if isinstance(model, nn.Sequential | nn.ModuleList):
        raise ValueError("an nn.Sequential would run model.last_bn as its last layer; wrap it in a module of its own")
    refuse_wrapped(model)
    head = find_head(model)
    refuse_sibling(model, head)
    refuse_functional_dropout(model, head)
    last_bn = reset_to_identity_(build_last_bn(head.in_features).to(head.weight))
    dropout = feeding_dropout(model, head)
    if batches is None:
        put_in(model, last_bn, head, dropout)
    else:
        refuse_fixed(model, head)
        candidate = dropout_before(model, head)
        seen = watch_head(model, head, candidate, batches, possible_heads(model, head))
        refuse_several(model, [*seen.siblings, head], "that read the same features; a last BN needs one linear head")
        put_in_calibrated(model, last_bn, head, candidate if seen.from_dropout else None, seen)
    accept_plain_weights(model)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier = partial(reset_classifier, model)  # type: ignore[assignment]
    return model


def put_in(model: nn.Module, last_bn: nn.BatchNorm1d, head: nn.Linear, dropout: nn.Module | None) -> None:
    """The last BN in its place, in the model's mode."""
    model.last_bn = last_bn.train(model.training)
    attach(model, head, dropout)


def put_in_calibrated(
    model: Any, last_bn: nn.BatchNorm1d, head: nn.Linear, dropout: nn.Module | None, seen: HeadInput
) -> None:
    """The last BN in its place with the statistics that were seen, which the head absorbs.

    Raises:
        ValueError: the outputs on the last batch change. The model is then as it was, as after any other error.
    """
    had = {"last_bn": model.last_bn} if hasattr(model, "last_bn") else {}
    before, weight = outputs(model, seen.last), head.weight.detach().clone()
    bias = None if head.bias is None else head.bias.detach().clone()
    standardize_(last_bn, head, seen)
    put_in(model, last_bn, head, dropout)
    try:
        change = largest_change(before, outputs(model, seen.last))
        if change > rounding(weight, before):
            raise ValueError(
                f"a last BN changes the outputs of this {type(model).__name__} by {change:.2g} of the largest, so none "
                "was put in: the head's weight is used outside of the head's call (F.linear, a parameter over the same "
                f"memory), the head is compiled, or {str(weight.dtype).removeprefix('torch.')} is too coarse; mend "
                "that, or leave out the batches"
            )
    except BaseException:  # a Ctrl-C, too
        model.last_bn_hook.remove()
        del model.last_bn, model.last_bn_hook
        vars(model).update(had)  # None, in a network of the zoo
        put_back_(head, weight, bias)
        raise


def refuse_wrapped(model: nn.Module) -> None:
    """ValueError for a model that runs, or reduces the gradients of, what was in it when it was wrapped or compiled."""
    name = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"{name} would not know the last BN; insert it into model.module first, then wrap that")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(f"a compiled {name} would not run the last BN; insert it first, then compile the model")


def feeding_dropout(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The nn.Dropout whose output `head` takes, where a library or an nn.Sequential says so."""
    parent = parent_of(model, head)
    known = hasattr(model, "get_classifier") or isinstance(parent, nn.Sequential)
    known = known or type(parent).__module__.partition(".")[0] in LIBRARIES
    return dropout_before(model, head) if known else None


def dropout_before(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The nn.Dropout that may feed `head`.

    That is the module right before it among its siblings, or, in a timm model, the sibling with one of timm's
    names for it; none where it stands in another place, too, or a second head (`aux_head`, timm's volo) reads its
    output.
    """
    parent = parent_of(model, head)
    if parent is None or isinstance(getattr(model, "aux_head", None), nn.Module):
        return None
    before = next((a for a, b in pairwise(parent.children()) if b is head), None)
    named = [getattr(parent, name, None) for name in DROPOUT_NAMES if hasattr(model, "get_classifier")]
    dropout = next((m for m in (before, *named) if isinstance(m, nn.Dropout)), None)
    places = [m for _, m in model.named_modules(remove_duplicate=False) if m is dropout]
    return dropout if len(places) == 1 else None


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


def attach(model: Any, head: nn.Module, dropout: nn.Module | None) -> None:
    """Hook `model.last_bn` before the head, or before the dropout that feeds it; `model.last_bn_hook` removes it."""
    site = dropout or head
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
    pooled = is_pooled(x, last_bn.num_features)  # flattened after this dropout
    if not linear_head and x.ndim != 2 and not pooled:
        return None
    rows = x.flatten(1) if pooled else x.reshape(-1, x.shape[-1])
    check_batch(rows, last_bn)
    return (last_bn(rows).reshape(x.shape), *rest)


def without_head(model: Any) -> nn.Module:
    """What stands in a timm classifier's place after `reset_classifier(0)`."""
    try:
        return model.get_classifier()  # type: ignore[no-any-return]
    except AttributeError:  # efficientvit_m0's and shvit's are a part of model.head, of which an Identity is left
        return model.head  # type: ignore[no-any-return]


def reset_classifier(model: Any, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """timm's reset_classifier, after which the last BN stands before the new head (or none: num_classes=0)."""
    type(model).reset_classifier(model, num_classes, *args, **kwargs)
    head = find_head(model) if num_classes else without_head(model)
    if isinstance(head, nn.Linear) and head.in_features != model.last_bn.num_features:
        model.last_bn = reset_to_identity_(build_last_bn(head.in_features).to(head.weight)).train(model.training)
    model.last_bn_hook.remove()
    attach(model, head, feeding_dropout(model, head))
