"""The head every network of the zoo shares: pooling, optional last BN, dropout, one linear classifier.

A model keeps its head's parts as its own attributes (`global_pool`, `last_bn`, `head_drop`, `fc`), so that
state-dict keys read as torchvision's and timm's do; these functions build and run them.
Shapes: B examples, C channels, H x W positions, D features, K classes.
"""

import math
from typing import Any

from timm.layers import create_classifier
from torch import Tensor, fx, nn

from condzoo.models.last_bn import accept_plain_weights, build_last_bn, check_batch

fx.wrap("check_batch")  # a traced network calls it as it is


def check_sizes(num_classes: int, in_chans: int) -> None:
    """Reject sizes no network can have.

    Raises:
        ValueError: `num_classes` below 0 (0 means: no classifier, features out) or `in_chans` below 1.
    """
    if isinstance(num_classes, bool) or not hasattr(num_classes, "__index__") or num_classes < 0:
        raise ValueError(f"num_classes must be an integer of at least 0 (0: features out), got {num_classes!r}")
    if isinstance(in_chans, bool) or not hasattr(in_chans, "__index__") or in_chans < 1:
        raise ValueError(f"in_chans must be an integer of at least 1, got {in_chans!r}")


def check_input_size(input_size: Any) -> None:
    """ValueError for what is no (channels, height, width) of images."""
    whole = isinstance(input_size, tuple | list) and len(input_size) == 3
    if not whole or not all(hasattr(n, "__index__") and not isinstance(n, bool) and n >= 1 for n in input_size):
        raise ValueError(
            f"input_size must be (channels, height, width), each an integer of at least 1, got {input_size!r}"
        )


def attach_head(
    model: Any,
    num_features: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    last_bn: bool,
    last_bn_init: str,
) -> None:
    """Give `model` its head: sets num_features, global_pool, last_bn (if asked for), head_drop and fc.

    `head_drop` is a module, not a function call, so that insert_last_bn can find what feeds the classifier.

    Raises:
        ValueError: an unknown `last_bn_init`, or one for a network that has no last BN.
    """
    if not last_bn and last_bn_init != "ones":
        raise ValueError(
            f"last_bn_init={last_bn_init!r} needs a last BN, and this network has none; take its _lastbn twin"
        )
    model.num_features = num_features
    model.has_last_bn = last_bn
    model.last_bn_init = last_bn_init
    model.drop_rate = drop_rate  # what timm's users read
    model.head_drop = nn.Dropout(drop_rate)
    set_classifier(model, num_classes, global_pool)
    if last_bn:
        accept_plain_weights(model)


def set_classifier(model: Any, num_classes: int, global_pool: str | None = None) -> None:
    """Replace pooling and classifier, as timm's `reset_classifier`; None keeps the pooling.

    The last BN stays as it is unless the pooling changes the number of features it sees.

    Raises:
        ValueError: `num_classes` below 0.
    """
    check_sizes(num_classes, 1)
    pool_type = model.global_pool.pool_type if global_pool is None else global_pool
    model.num_classes = num_classes
    model.global_pool, model.fc = create_classifier(model.num_features, num_classes, pool_type=pool_type)
    model.head_hidden_size = model.num_features * model.global_pool.feat_mult()
    if isinstance(model.fc, nn.Linear):
        init_classifier(model.fc)
    kept = getattr(model, "last_bn", None)
    if model.has_last_bn and (kept is None or kept.num_features != model.head_hidden_size):
        model.last_bn = build_last_bn(model.head_hidden_size, model.last_bn_init)
    match_placement(model)


def drop_head(model: Any, num_features: int) -> None:
    """Leave out last BN, pooling and classifier: what comes out then are maps of `num_features` channels."""
    model.has_last_bn, model.num_features = False, num_features
    if hasattr(model, "last_bn"):
        del model.last_bn
    set_classifier(model, 0, "")


def match_placement(model: Any) -> None:
    """Put a new head where the body is: its device and dtype (not on the meta device), its train/eval mode."""
    body = next(model.parameters())
    for part in (model.global_pool, model.fc, getattr(model, "last_bn", None)):
        if part is not None:
            part.train(model.training)
            if not any(p.is_meta for p in part.parameters()):
                part.to(device=body.device, dtype=body.dtype)


def init_classifier(fc: nn.Linear) -> None:
    """torch7's default for linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), with zero bias."""
    bound = 1 / math.sqrt(fc.in_features)
    nn.init.uniform_(fc.weight, -bound, bound)
    nn.init.zeros_(fc.bias)


def forward_head(model: Any, x: Tensor, pre_logits: bool = False) -> Tensor:  # [B, C, H, W] -> [B, K]
    """Pool, last BN, dropout, classify; `pre_logits` stops at what the classifier would see, [B, D].

    An unpooled map (global_pool="") passes the last BN by: it is defined on the pooled vector.
    """
    x = model.global_pool(x)
    # what is known without x comes first: torch.fx cannot ask a traced value
    flat = bool(model.global_pool.pool_type) or not getattr(model, "spatial", True)
    if model.has_last_bn and (flat or x.ndim == 2):
        check_batch(x, model.last_bn)
        x = model.last_bn(x)
    x = model.head_drop(x)
    return x if pre_logits else model.fc(x)
