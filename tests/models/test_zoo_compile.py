"""torch.compile without a graph break and torch.export with a free batch size, on one small network a family."""

import shutil
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from condzoo.models import create_model

ONE_A_FAMILY = {
    "cifar_resnet8_lastbn": (3, 32, 32),
    "cifar_preresnet8_lastbn": (3, 32, 32),
    "cifar_vgg8_nobn": (3, 32, 32),
    "cifar_vgg16_lastbn": (3, 32, 32),
    "resnet18_lastbn": (3, 32, 32),
    "preresnet18": (3, 32, 32),
    "mlp4x24_lastbn": (1, 12, 12),
}


def network_and_images(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return create_model(name, drop_rate=0.0), torch.randn(5, *ONE_A_FAMILY[name])


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_compiles_to_one_graph(name: str):
    model, x = network_and_images(name)
    torch.compiler.reset()
    # the graph is what depends on the network; the code generated from it is PyTorch's business
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    if name in ("cifar_resnet8_lastbn", "mlp4x24_lastbn"):
        model.train()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_generated_code_computes_the_same():
    model, x = create_model("mlp2x8_lastbn", input_size=(1, 4, 4)), torch.randn(5, 1, 4, 4)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        compiled = torch.compile(model)
        torch.testing.assert_close(gradients(model, compiled(x)), gradients(model, model(x)), rtol=1e-3, atol=1e-5)


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    """Gradients of a loss of y with respect to every parameter."""
    return list(torch.autograd.grad(y.square().mean(), list(model.parameters())))


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_exports_with_a_free_batch_size(name: str):
    model, x = network_and_images(name)
    program = export(model.eval(), (x,), dynamic_shapes=({0: Dim("batch")},))
    for images in (x, torch.randn(3, *ONE_A_FAMILY[name])):
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler's own, where it breaks the graph to raise
def test_the_check_of_the_batch_survives_compilation():
    model, x = network_and_images("mlp4x24_lastbn")
    torch.compiler.reset()
    compiled = torch.compile(model.train(), backend="eager")
    compiled(x)
    with pytest.raises(ValueError, match="at least 2 examples in training mode, got a batch of 1"):
        compiled(x[:1])
