"""Units counted in growing looks and singular values by shape, against numpy over everything at once."""

import numpy as np
import pytest
import torch
from torch import nn

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
