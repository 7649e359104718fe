"""Initializers: moments over many seeds, exact orthogonality, reproducibility, and networks that are not ours."""

import inspect
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from condzoo.models.initializers import SCHEMES, init_weights

SEEDS = 40
# layer, fan_in and fan_out of one group, counted by hand
LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), 24, 40),
    "conv": (lambda: nn.Conv2d(6, 10, 3), 6 * 9, 10 * 9),
    "grouped_conv": (lambda: nn.Conv2d(8, 12, (3, 1), groups=4), 2 * 3, 3 * 3),
    "depthwise_conv": (lambda: nn.Conv2d(16, 16, 3, groups=16), 9, 9),
    "conv1d": (lambda: nn.Conv1d(6, 20, 5), 30, 100),
    "transposed_conv": (lambda: nn.ConvTranspose2d(6, 10, 3, groups=2), 3 * 9, 5 * 9),
}
# variance by the textbook formula, and kurtosis E[w^4] / Var[w]^2 of its distribution
UNIFORM, NORMAL = 9 / 5, 3.0
MOMENTS = {
    "random": (lambda fan_in, fan_out, conv: 1 / (3 * fan_in), UNIFORM),
    "lecun_normal": (lambda fan_in, fan_out, conv: 1 / fan_in, NORMAL),
    "xavier": (lambda fan_in, fan_out, conv: 2 / (fan_in + fan_out), UNIFORM),
    "he": (lambda fan_in, fan_out, conv: 2 / (fan_out if conv else fan_in), NORMAL),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scheme", MOMENTS)
def test_mean_and_variance_within_four_standard_errors(scheme: str, kind: str):
    build, fan_in, fan_out = LAYERS[kind]
    layer = build()
    variance_of, kurtosis = MOMENTS[scheme]
    variance = variance_of(fan_in, fan_out, kind != "linear")
    draws = []
    for seed in range(SEEDS):
        init_weights(layer, scheme, seed=seed)
        draws.append(layer.weight.detach().double().flatten().clone())
    w = torch.cat(draws)
    assert abs(w.mean()) < 4 * math.sqrt(variance / len(w))
    assert abs(w.square().mean() - variance) < 4 * variance * math.sqrt((kurtosis - 1) / len(w))
    # the distribution, not only its width: the fourth moment lies 1.2 apart between the two
    assert abs(w.pow(4).mean() / variance**2 - kurtosis) < 0.5


@pytest.mark.parametrize("scheme", ["random", "xavier"])
def test_uniform_schemes_keep_within_their_bound(scheme: str):
    layer = init_weights(nn.Linear(30, 60), scheme, seed=0)
    bound = {"random": 1 / math.sqrt(30), "xavier": math.sqrt(6 / 90)}[scheme]
    assert 0.95 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)


def group_matrices(layer: nn.Module) -> list[Tensor]:
    """Each group's weight as [out, fan_in], by slicing: an unfolding of its own."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return [weight]
    if isinstance(layer, nn.ConvTranspose2d):
        return [
            torch.stack([block[:, o].flatten() for o in range(block.shape[1])]) for block in weight.chunk(layer.groups)
        ]
    return [torch.stack([row.flatten() for row in block]) for block in weight.chunk(layer.groups)]


@pytest.mark.parametrize("kind", LAYERS)
def test_orthogonal_is_exact_for_every_group(kind: str):
    layer = LAYERS[kind][0]().double()
    init_weights(layer, "orthogonal", seed=1)
    for w in group_matrices(layer):
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-12)


def test_orthogonal_is_not_the_same_in_every_group():
    first, second = group_matrices(init_weights(nn.Conv2d(8, 4, 3, groups=2), "orthogonal", seed=0))
    assert not torch.allclose(first, second)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "scaled"])
def test_a_seed_reproduces_and_leaves_the_global_generator_alone(scheme: str):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = small_net(), small_net(), small_net()
    torch.set_rng_state(before)
    init_weights(one, scheme, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    init_weights(two, scheme, seed=3)
    init_weights(other, scheme, seed=4)
    for layer in (0, 3):
        assert torch.equal(one[layer].weight, two[layer].weight)
        assert not torch.equal(one[layer].weight, other[layer].weight)


def test_a_seed_of_numpys_is_one():
    one, two = (init_weights(small_net(), "he", seed=seed) for seed in (3, np.int64(3)))
    assert torch.equal(one[3].weight, two[3].weight)


def test_without_a_seed_the_global_generator_is_used():
    nets = []
    for _ in range(2):
        torch.manual_seed(11)
        nets.append(init_weights(small_net(), "he"))
    assert torch.equal(nets[0][3].weight, nets[1][3].weight)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    init_weights(nets[0], "he")
    assert not torch.equal(torch.get_rng_state(), before)


def test_biases_become_zero_and_norm_layers_stay():
    net = small_net()
    nn.init.uniform_(net[1].weight, 2, 3)
    norm = net[1].weight.clone()
    assert init_weights(net, "he", seed=0) is net
    assert torch.equal(net[0].bias, torch.zeros(4))
    assert torch.equal(net[3].bias, torch.zeros(5))
    assert torch.equal(net[1].weight, norm)


@pytest.mark.parametrize(
    ("scheme", "factors", "expected"),
    [
        ("scaled", 0.5, (0.5, 0.5)),
        ("scaled", [0.5, 3], (0.5, 3.0)),
        ("scaled", np.array([0.5, 3]), (0.5, 3.0)),
        ("scaled", torch.tensor([0.5, 3]), (0.5, 3.0)),
        ("scaled", torch.tensor(0.5), (0.5, 0.5)),
        ("scaled:0.5", None, (0.5, 0.5)),
        ("scaled:0.25,2", None, (0.25, 2.0)),
    ],
)
def test_scaled_multiplies_each_weight_and_nothing_else(scheme, factors, expected):
    net = small_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    init_weights(net, scheme, factors=factors)
    scale = {"0.weight": expected[0], "3.weight": expected[1]}
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name] * scale.get(name, 1.0)), name


def test_a_shared_weight_is_one_layer():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    before = one.weight.detach().clone()
    init_weights(nn.Sequential(one, two), "scaled", factors=[2.0])
    assert torch.equal(two.weight, 2 * before)
    init_weights(nn.Sequential(one, two), "he", seed=0)
    assert not one.bias.any()
    assert not two.bias.any()  # its own, beside the weight that both have


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "scaled"])
def test_meta_device_and_other_dtypes(scheme: str, dtype: torch.dtype):
    net = init_weights(small_net().to(dtype), scheme, seed=0)
    assert net[3].weight.dtype == dtype
    assert 0 < net[3].weight.double().var() < 1
    with torch.device("meta"):
        assert init_weights(small_net(), scheme, seed=0)[0].weight.is_meta


@pytest.mark.parametrize("build", [lambda: torchvision.models.resnet18(), lambda: timm.create_model("test_vit")])
def test_networks_that_are_not_ours(build):
    net = init_weights(build(), "he", seed=0)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        positions = math.prod(getattr(layer, "kernel_size", (1,)))
        fan = layer.out_channels * positions if isinstance(layer, nn.Conv2d) else layer.in_features
        w = layer.weight.detach().double()
        assert abs(w.square().mean() * fan / 2 - 1) < 4 * math.sqrt(2 / w.numel()), layer
    assert len(layers) > 10


@pytest.mark.parametrize(
    ("scheme", "factors", "text"),
    [
        (
            "hee",
            None,
            r"unknown init 'hee'; did you mean 'he'\? one of: random, lecun_normal, xavier, he, orthogonal, scaled",
        ),
        ("zzz", None, r"unknown init 'zzz'; one of: random"),
        ("scaled", None, r"'scaled' needs factors, once: init_weights\(..., factors=0.5\) or 'scaled:0.5,1,2'"),
        ("scaled:2", 2.0, r"needs factors, once"),
        ("scaled:a,b", None, r"factors must be numbers with commas between, got 'a,b'"),
        ("scaled", [1.0, 2.0, 3.0], r"factors must be one for all or one a layer \(2\), got 3"),
        ("scaled", -1.0, r"factors must be positive and finite, got -1.0"),
        ("he", 2.0, r"factors are for init 'scaled' only, got them with 'he'"),
        ("he:2", None, r"factors are for init 'scaled' only, got them with 'he:2'"),
    ],
)
def test_errors_say_what_came_and_what_is_allowed(scheme, factors, text):
    net = small_net()
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=text):
        init_weights(net, scheme, factors=factors)
    assert torch.equal(net[0].weight, before)


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str 'resnet18'"):
        inspect.unwrap(init_weights)("resnet18", "he")  # as outside of tests, where no type is checked before


def test_a_parametrized_weight_is_an_error():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"the weight of layer '0' is computed by a parametrization"):
        init_weights(net, "he")


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "scaled"])
@pytest.mark.parametrize(("inputs", "units"), [(0, 3), (3, 0)])
def test_a_layer_without_weights_has_none_to_draw(scheme: str, inputs: int, units: int):
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(inputs, units)
    assert init_weights(layer, scheme, seed=0).bias.tolist() == [0.0] * units
