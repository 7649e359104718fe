"""The network of a recipe: what its [model] says, and what follows the data."""

import pytest
import timm
import torch
from torch import nn

from condzoo.training.networks import network_of
from condzoo.training.schema import ModelSection

NORMS = nn.BatchNorm1d | nn.BatchNorm2d


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_timm_network_without_norms_is_the_network_less_its_norms():
    section = ModelSection(name="resnet18", args={"norm_layer": "none", "zero_init_last": False})
    with torch.device("meta"):
        plain, usual = network_of(section, (3, 64, 64), 10), timm.create_model("resnet18", num_classes=10)
    norms = {name for name, module in usual.named_modules() if isinstance(module, NORMS)}
    assert norms
    assert not any(isinstance(module, NORMS) for module in plain.modules())
    kept = [key for key in usual.state_dict() if key.rpartition(".")[0] not in norms]
    assert list(plain.state_dict()) == kept
    assert section.args["norm_layer"] == "none", "the recipe is left as it was"


@pytest.mark.parametrize(("name", "shape"), [("cifar_resnet8", (1, 8, 8)), ("mlp4x24", (1, 12, 12))])
def test_the_network_follows_the_images(name, shape):
    model = network_of(ModelSection(name=name), shape, 7)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
