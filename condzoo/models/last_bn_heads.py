"""The head of a classifier: the linear layer that a last BN is put before.

Where timm's get_classifier does not say which it is, the names and the order of the modules do.
"""

from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

# where torchvision's models, and most others without timm's get_classifier, keep their head
HEAD_NAMES = ("fc", "classifier", "heads", "head", "last_linear")


def find_head(model: nn.Module) -> nn.Linear:
    """The last linear layer of a classifier: by timm's get_classifier, torchvision's names, or as the last layer.

    Raises:
        ValueError: no head, more than one, one that ends in another layer, or none that is plainly the last.
    """
    heads = {id(head): head for head in map(partial(head_in, model), find_classifiers(model))}
    if len(heads) > 1:  # a layer of a head's name, and another layer after it
        classes = getattr(model, "num_classes", None)
        heads = {key: head for key, head in heads.items() if head.out_features == classes} or heads
    if len(heads) > 1:
        names = [name for name, module in model.named_modules() if id(module) in heads]
        raise ValueError(
            f"the head of {type(model).__name__} may be {' or '.join(names)}; "
            "set model.num_classes, or give only the head one of the names " + ", ".join(HEAD_NAMES)
        )
    return next(iter(heads.values()))


def head_in(model: nn.Module, classifier: Any) -> nn.Linear:
    """The last linear layer of the part that may hold the head; errors as `find_head`."""
    name = type(model).__name__
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


def find_classifiers(model: Any) -> list[Any]:
    """The modules that may hold the head (timm's tuple of heads is one); the model itself where nothing names them.

    A module with a name that is common for a head may be a hidden layer of a network of no library: where another
    linear layer is registered after it, that one may be the head, too.
    """
    if hasattr(model, "get_classifier"):
        return [model.get_classifier()]
    named = [m for m in (getattr(model, name, None) for name in HEAD_NAMES) if isinstance(m, nn.Module)]
    last = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))][-1:]
    after = [m for m in last if isinstance(m, nn.Linear) and all(m is not part for n in named for part in n.modules())]
    return named + after or [model]


def refuse_sibling(model: nn.Module, head: nn.Linear) -> None:
    """Reject a head that is registered right after a layer of the same sizes, which cannot feed it.

    Raises:
        ValueError: there is one, of more or fewer outputs than inputs.
    """
    parent = parent_of(model, head)
    layers = [m for m in parent.children() if any(True for _ in m.parameters())] if parent is not None else []
    before = next((a for a, b in pairwise(layers) if b is head), None)
    if not isinstance(before, nn.Linear) or head.in_features == head.out_features:
        return
    if (before.in_features, before.out_features) == (head.in_features, head.out_features):
        refuse_several(model, [before, head], "of the same sizes; a last BN needs one linear head")


def possible_heads(model: nn.Module, head: nn.Linear) -> list[nn.Linear]:
    """Linear layers that are heads, too, if they read its input: of as many outputs; any, where nothing names it."""
    if hasattr(model, "get_classifier"):
        return []
    named = any(isinstance(getattr(model, name, None), nn.Module) for name in HEAD_NAMES)
    others = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return [m for m in others if not named or m.out_features == head.out_features]


def refuse_several(model: nn.Module, heads: list[nn.Linear], what: str) -> None:
    """ValueError for more than one head; a method get_classifier says which of them is meant."""
    if len(heads) > 1 and not hasattr(model, "get_classifier"):
        names = ", ".join(name for name, module in model.named_modules() if any(module is head for head in heads))
        raise ValueError(
            f"{type(model).__name__} has {len(heads)} heads {what}: {names}; where one is meant, say which by a method "
            "get_classifier() of the model"
        )


def parent_of(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The module that `head` is a direct part of; none where it is the model itself."""
    return next((m for m in model.modules() if any(child is head for child in m.children())), None)
