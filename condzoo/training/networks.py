"""The network a recipe describes, for the images its data has."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from condzoo.models import create_model
from condzoo.training.schema import ModelSection

_MLP = re.compile(r"mlp\d+x\d+")
NO_NORM = "none"


def network_of(section: ModelSection, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Build the network of a recipe's [model], its weights drawn from torch's global generator.

    Args:
        section: the recipe's [model]; `args.norm_layer = "none"` builds a timm network without normalization.
        image_shape: (channels, height, width) of the images.
        num_classes: outputs.

    Raises:
        ValueError, TypeError: as `condzoo.create_model`.
    """
    arguments = dict(section.args)
    if _MLP.match(section.name):
        arguments["input_size"] = image_shape
    else:
        arguments["in_chans"] = image_shape[0]
    if section.drop_rate is not None:
        arguments["drop_rate"] = section.drop_rate
    if section.last_bn_init is not None:
        arguments["last_bn_init"] = section.last_bn_init
    if arguments.get("norm_layer") == NO_NORM:  # timm knows its norms by name, but has none for their absence
        arguments["norm_layer"] = without_norm
    return create_model(section.name, num_classes=num_classes, init=section.init, **arguments)


def without_norm(features: int, **_: object) -> nn.Identity:
    """What timm's networks take in place of a norm's class."""
    return nn.Identity()


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop the updates of every parameter whose name matches a pattern (fnmatch, e.g. `layer1.*`).

    BatchNorm statistics of a frozen layer still follow the data.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join([*named][:3])
            raise ValueError(f"freeze: {pattern!r} matches no parameter; they are called like {some}")
        for name in matched:
            named[name].requires_grad_(False)
