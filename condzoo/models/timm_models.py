"""timm's own networks by `create_model`: the names and tags that timm has, and `init` afterwards."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import timm
from timm.models import get_deprecated_models, is_model
from torch import nn

from condzoo.models.initializers import init_weights
from condzoo.models.pretrained import brings_weights


def create_timm_model(
    name: str,
    pretrained: bool = False,
    init: str | None = None,
    last_bn_init: str = "ones",
    model_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """A network of timm's own, delegated to timm; `init` is applied to it afterwards.

    Raises:
        ValueError: a name that timm has removed; a tag, or weights, that it does not have; `last_bn_init`.
        OSError: weights that the Hub did not give.
    """
    if last_bn_init != "ones":
        raise ValueError(f"last_bn_init is for networks with a last BN; {name!r} is timm's own and has none")
    if is_model(name):
        arch, _, tag = current_name(name).partition(".")
        if (tag or pretrained) and not brings_weights(model_kwargs):
            check_timm_weights(arch, tag)
    try:
        model = timm.create_model(name, pretrained=pretrained, **model_kwargs)  # by an older name timm warns
    except OSError as error:  # the Hub's client says in many lines what it did not give
        lines = str(error).splitlines()
        if len(lines) < 2:
            raise
        raise OSError(f"the weights of {name!r} did not come from the Hub: {lines[0]}") from error
    return model if init is None else init_weights(model, init)


def current_name(name: str) -> str:
    """What an older name of timm's stands for today, with its tag: "tv_resnet50" is "resnet50.tv_in1k".

    Any other name stays as it is, and so does a tag that is given.

    Raises:
        ValueError: a name that timm has removed.
    """
    arch, _, tag = name.partition(".")
    older = get_deprecated_models()
    if arch not in older:
        return name
    today = older[arch]
    if today is None:
        raise ValueError(f"timm has removed {arch!r} and has no other in its place; timm.list_models() has the rest")
    return f"{today.partition('.')[0]}.{tag}" if tag else today


def check_timm_weights(arch: str, tag: str) -> None:
    """ValueError where timm has no weights of this tag, or with "" none at all."""
    known = timm.list_pretrained(f"{arch}.*") + ([arch] if arch in timm.list_pretrained(arch) else [])
    if not known:
        raise ValueError(f"timm has no pretrained weights for {arch!r}")
    name = f"{arch}.{tag}"
    if tag and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"timm has no weights {name!r}; {hint}it has: {', '.join(known)}")
