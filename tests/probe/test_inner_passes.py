"""Gradient passes inside the forward pass or the loss are a part of what is measured: g is the final pass's alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import measure


class Forces(nn.Module):
    """Minus the derivative of an energy, as interatomic potentials return it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        x = x.detach().requires_grad_(True)
        energy = self.c(F.softplus(self.b(self.a(x).tanh()))).square().sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn((8, 3), generator=generator, dtype=torch.float64), torch.arange(8) % 3


def test_gradients_of_a_force_field_are_those_of_the_loss(kit):
    model, (x, y) = Forces(), data()
    found, expected = measure(model, (x, y)), kit.oracle(model, x, y)
    for name in "abc":
        assert found[name].output_grad.rows == 8
        torch.testing.assert_close(found[name].output_grad.eigenvalues, expected[name][1], rtol=0, atol=1e-14)


def test_nor_have_those_of_model_labels_a_part_of_the_first_batchs_forward_pass():
    model, (x, _) = Forces(), data()
    whole, split = (
        measure(model, batches, loss=nn.MSELoss(), labels="model")
        for batches in ([(x, None)], [(x[:3], None), (x[3:], None)])
    )
    for name in "abc":
        a, b = whole[name].output_grad, split[name].output_grad
        torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_a_gradient_penalty_of_the_loss_is_differentiated_and_not_read(kit, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 3)).double()
    x, y = data()
    x.requires_grad_(True)

    def loss(output, target):
        pixels, labels = target
        (slope,) = torch.autograd.grad(output.logsumexp(1).sum(), pixels, create_graph=True)
        return F.cross_entropy(output, labels) + 0.5 * (slope.norm(dim=1) - 1).square().mean()

    zero = torch.zeros((8, 6), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(8 * loss(model[2](model[1](model[0](x) + zero)), (x, y)), zero)
    found = measure(model, [(x, (x, y))], loss=loss)["0"].output_grad
    assert found.rows == 8
    torch.testing.assert_close(found.eigenvalues, kit.eigenvalues(g, 1, 8), rtol=0, atol=1e-14)
    assert x.grad is None
