"""Largest eigenvalues without matrices, against the full spectra and numpy."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from condzoo.probe import curvature, top_curvature
from condzoo.probe.lanczos import largest_eigenvalues


def networks(name):
    torch.manual_seed(0)
    if name == "conv":
        body = [nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 4)).double()
    norm = nn.BatchNorm1d(5) if name == "bn" else nn.Identity()
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5), norm, nn.Tanh(), nn.Linear(5, 4)).double()


class PartlyUsed(nn.Module):
    """A network with a layer that its forward pass does not call."""

    def __init__(self, used):
        super().__init__()
        self.used, self.other = used, nn.Linear(2, 3).double()

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "conv", "bn"])
@pytest.mark.parametrize("whole", [True, False])
def test_they_equal_the_full_spectrums(kit, name, matrix, whole):
    model, (x, y) = networks(name), kit.images(20)
    block = None if whole else {"mlp": "1", "conv": "2", "bn": "4"}[name]
    found = top_curvature(model, x, y, matrix, block, k=3)
    expected = curvature(model, x, y, matrix, block).eigenvalues[:3]
    assert torch.allclose(found.values, expected, rtol=1e-7, atol=1e-10 * float(expected[0]))
    assert bool((found.residuals <= 1e-8 * found.values[0]).all())


def test_residuals_bound_the_error_where_it_stops_early():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn((60, 60), generator=generator, dtype=torch.float64)
    a = a @ a.T
    found = largest_eigenvalues(lambda v: a @ v, 60, most=6)
    error = float((torch.linalg.eigvalsh(a)[-1] - found.values[0]).abs())
    assert found.products == 6
    assert 1e-6 < error <= float(found.residuals[0])


def test_the_directions_are_held_once():
    """Of ResNet-50 they are gigabytes."""
    values, seen = torch.arange(1.0, 5001.0).double(), []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            seen.append(found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    with Largest():
        found = largest_eigenvalues(lambda v: values * v, 5000, most=60)
    assert found.products == 60
    assert max(seen) == 5000


def test_k_out_of_range_is_explained():
    with pytest.raises(ValueError, match="k must be from 1 to the matrix's side 3, got 4"):
        largest_eigenvalues(lambda v: v, 3, 4)


@pytest.mark.parametrize("matrix", ["hessian", "fisher", "ggn", "grad_moment"])
def test_there_are_as_many_as_of_the_full_spectrum_where_a_layer_is_not_called(kit, matrix):
    model, (x, y) = PartlyUsed(networks("mlp")), kit.images(6)
    full = curvature(model, x, y, matrix).eigenvalues
    found = top_curvature(model, x, y, matrix, k=len(full))
    assert torch.allclose(found.values, full, rtol=1e-7, atol=1e-9 * float(full[0]))
    assert found.residuals.shape == full.shape
    with pytest.raises(ValueError, match=f"k must be from 1 to the matrix's side {len(full)}, got {len(full) + 1}"):
        top_curvature(model, x, y, matrix, k=len(full) + 1)


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_repeated_eigenvalues_are_all_there(copies, k):
    generator = torch.Generator().manual_seed(2)
    values = torch.tensor([5.0, 3.0, 2.9, 1.0, 0.5, 0.1, -4.0], dtype=torch.float64).repeat(copies)
    basis = torch.linalg.qr(torch.randn((len(values), len(values)), generator=generator, dtype=torch.float64)).Q
    a = basis @ torch.diag(values) @ basis.T
    found = largest_eigenvalues(lambda v: a @ v, len(values), k)
    assert torch.allclose(found.values, values.sort(descending=True).values[:k], rtol=1e-9, atol=1e-12)
    assert bool((found.residuals <= 1e-7).all())


@pytest.mark.parametrize("matrix", ["hessian", "fisher", "ggn"])
def test_a_kronecker_product_with_the_identity_repeats_each_value(kit, matrix):
    """The Hessian of a linear regression is Sigma_x (x) I: each of Sigma_x's eigenvalues, as often as outputs."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3, bias=False).double(), torch.randn(40, 5).double()
    regression = matrix != "ggn"
    y = torch.randn(40, 3).double() if regression else torch.randint(3, (40,))
    loss = nn.MSELoss() if regression else None
    found = top_curvature(model, x, y, matrix, k=5, loss=loss).values
    expected = curvature(model, x, y, matrix, loss=loss).eigenvalues[:5]
    assert torch.allclose(found, expected, rtol=1e-7)
    if regression:
        assert torch.allclose(expected[:3], expected[0].expand(3), rtol=1e-9)


def test_beyond_the_rank_the_values_are_zero(kit):
    model, (x, y) = networks("mlp"), kit.images(4)
    found = top_curvature(model, x, y, "grad_moment", k=8)
    expected = curvature(model, x, y, "grad_moment").eigenvalues[:8]
    assert torch.allclose(found.values, expected, rtol=1e-7, atol=1e-12 * float(expected[0]))
    assert found.values.shape == (8,)
