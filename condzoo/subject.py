"""A network of the zoo under examination: built or copied, in float64 and train mode, with images that suit its depth.

Float64 shows the network and not round-off, and the deepest networks without BatchNorm, whose signals leave
float32's range, too.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.catalog import ModelInfo, list_models, model_info
from condzoo.models import create_model


@dataclass(frozen=True)
class Subject:
    """A network under validation, in float64 and train mode, with its images and labels."""

    info: ModelInfo
    model: Any
    x: Tensor
    y: Tensor


def prepare(name_or_model: str | nn.Module, seed: int) -> Subject:
    """The network as a float64 copy in train mode, and a batch small enough for its depth."""
    if isinstance(name_or_model, str):
        info = model_info(name_or_model)
        torch.manual_seed(seed)
        model = create_model(info.name)
    else:
        model = copy.deepcopy(name_or_model)
        arch = getattr(model, "pretrained_cfg", {}).get("architecture")
        if arch not in list_models():
            raise ValueError(
                f"{type(model).__name__} is not a network of the zoo; validate takes a name or one of those"
            )
        info = model_info(arch)
    batch = 64 if info.family == "mlp" else 16 if info.depth <= 110 else 8
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *small_input(info), generator=generator, dtype=torch.float64)
    y = torch.randint(info.num_classes, (batch,), generator=generator)
    return Subject(info, model.double().train(), x, y)


def small_input(info: ModelInfo) -> tuple[int, int, int]:
    """(C, H, W) of the images a network is examined on.

    Convolutional networks keep their promises at any size, and float64 convolutions are slow: the smallest images
    that leave a position after the last stride.
    """
    if info.family == "mlp":
        return info.input_size
    pixels = 8 if info.family in ("cifar_resnet", "cifar_preresnet", "cifar_vgg") else 32
    return (info.input_size[0], pixels, pixels)


def weighted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Convolutions and linear layers by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))


@contextmanager
def recorded_inputs(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The inputs of `layers` in the order of the forward pass that runs inside."""
    inputs: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone())) for m in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
