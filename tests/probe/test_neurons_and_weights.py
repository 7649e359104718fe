"""Units counted in growing looks and singular values by shape, against numpy over everything at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, measure
from condzoo.probe.neurons import RunningNeurons
from condzoo.probe.weights import norms_of


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 9, 80])
def test_units_are_counted_over_every_sample(channels_first, samples):
    """Unit 0 dies, 1 is full, 2 and 3 are decided by the last sample alone, 4 by any, 5 holds NaN."""
    x = torch.ones(samples, 6, 3)
    x[:, 0], x[:, 2], x[-1, 2, 2], x[-1, 3, 0] = 0.0, 0.0, 1.0, 0.0
    x[:, 4, 0], x[0, 5, 1] = 0.0, float("nan")
    counted = RunningNeurons()
    for part in x.split(50):
        counted.add(part if channels_first else part.transpose(1, 2), channels_first=channels_first)
    values = x.transpose(0, 1).flatten(1).numpy()
    dying, full = (values == 0).all(1), (values > 0).all(1)
    found = counted.count()
    assert (found.units, found.rows) == (6, 3 * samples)
    assert (found.dying, found.full) == (int(dying.sum()), int(full.sum())) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("samples", [1, 20_000])
def test_the_smallest_positive_number_of_a_dtype_is_not_zero(dtype, samples):
    x = torch.zeros(samples, 4, dtype=dtype)
    x[:, 1] = torch.finfo(dtype).tiny
    x[-1, 2] = torch.finfo(dtype).tiny
    counted = RunningNeurons()
    counted.add(x, channels_first=False)
    found = counted.count()
    assert (found.dying, found.full) == (2, 1 + (samples == 1))


def test_singular_values_of_shapes_that_repeat_and_of_weights_that_are_not_finite():
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 6, 3, groups=2) for _ in range(3)]
    layers = {**{f"conv{i}": m for i, m in enumerate(convs)}, "wide": nn.Linear(9, 5), "tall": nn.Linear(5, 9)}
    tensors = {name: module.weight.detach() for name, module in layers.items()}
    tensors["conv1"] = tensors["conv1"].clone().fill_(float("inf"))
    found = norms_of(layers, tensors)
    assert list(found) == ["conv0", "conv2", "wide", "tall"]
    for name, norms in found.items():
        groups = getattr(layers[name], "groups", 1)
        blocks = tensors[name].double().numpy().reshape(groups, len(tensors[name]) // groups, -1)
        assert norms.frobenius == pytest.approx(np.linalg.norm(blocks), rel=1e-12)
        assert norms.sigma_max == pytest.approx(max(np.linalg.norm(block, 2) for block in blocks), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1.0, 1e25, 1e37, 0.0])
def test_singular_values_of_large_weights_do_not_leave_float32(scale):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn((1100, 3), generator=generator) for _ in range(2))
    weight = (left @ right.T / 40) * scale
    found = norms_of({"fc": nn.Linear(1100, 1100)}, {"fc": weight})["fc"]
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert found.sigma_max == pytest.approx(expected[0], rel=1e-4)
    assert found.frobenius == pytest.approx(np.sqrt((expected**2).sum()), rel=1e-6)


def of_rank_3(shape):
    return torch.randn(shape[0], 3) @ torch.randn(3, shape[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [torch.randn, torch.ones, of_rank_3, lambda shape: torch.eye(*shape)])
def test_singular_values_of_large_weights_are_right_where_many_are_nearly_as_large(make, autocast):
    torch.manual_seed(0)
    weight = make((1100, 1030))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = norms_of({"fc": nn.Linear(1030, 1100)}, {"fc": weight})["fc"]
    exact = float(torch.linalg.svdvals(weight.double()).max())
    assert found.sigma_max == pytest.approx(exact, rel=2e-5)


def small_batch(dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((6, 5), generator=generator).to(dtype), torch.randint(3, (6,), generator=generator)


def test_weight_gradients_of_many_batches_do_not_stop_growing_in_bfloat16():
    """Of 300 equal batches the mean gradient is one's; a sum in bfloat16 stops at 256."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 3).bfloat16(), small_batch(torch.bfloat16)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)
    with Probe(model, loss_scale=1.0) as probe:
        for _ in range(300):
            F.cross_entropy(model(x), y).backward()
        probe.step()
    for found in (measure(model, [(x, y)] * 300), probe.latest):
        assert found[""].weight_grad_frobenius == pytest.approx(float(gradient.float().norm()), rel=1e-4)


def test_weight_gradients_under_a_loss_scale_do_not_vanish_in_float16():
    """Unscaled they would be under float16's smallest number, which is why the loss was scaled."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 3).half(), small_batch(torch.float16)
    gradients = torch.autograd.grad(2.0**-24 * F.cross_entropy(model.double()(x.double()), y), model.weight)
    with Probe(model.half(), loss_scale=2.0**24) as probe:
        F.cross_entropy(model(x), y).backward()  # times 2^-24 times the scale
        probe.step()
    assert probe.latest[""].weight_grad_frobenius == pytest.approx(float(gradients[0].norm()), rel=1e-2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_has_no_norms():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.nothing = nn.Linear(6, 3), nn.Linear(6, 0)

        def forward(self, x):
            return torch.cat([self.head(x), self.nothing(x)], dim=1)

    found = measure(Empty(), (torch.randn(8, 6), torch.arange(8) % 3))
    assert list(found) == ["head"]
    assert "nothing" in found.skipped
    layers = {"nothing": nn.Linear(6, 0)}
    assert norms_of(layers, {"nothing": layers["nothing"].weight}) == {}
