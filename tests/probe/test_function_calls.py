"""Layers whose weight is used by F.linear, as those of attention in torchvision's Swin, against the same called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import linear  # by this name a function put into torch.nn.functional is not seen
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Probe, curvature, measure, top_curvature

USES = {
    "called": lambda layer, x: layer(x),
    "function": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "keywords": lambda layer, x: F.linear(input=x, weight=layer.weight, bias=layer.bias),
    "its own name": lambda layer, x: linear(x, layer.weight, layer.bias),
    "changed in place": lambda layer, x: F.linear(x, layer.weight, layer.bias).mul_(1.0),
    "checkpoint": lambda layer, x: checkpoint(F.linear, x, layer.weight, layer.bias, use_reentrant=False),
    "product": lambda layer, x: x @ layer.weight.mT + layer.bias,
}


class Attention(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use, self.qkv, self.proj = USES[use], nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.use(self.qkv, x).chunk(3, dim=-1)
        return self.use(self.proj, F.scaled_dot_product_attention(q, k, v))


class Network(nn.Module):
    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attn, self.head = nn.Linear(5, 6), Attention(use), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.head(F.relu(self.attn(self.first(x))).mean(1))


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn((8, 7, 5), generator=generator).double(), torch.arange(8) % 3


def step(model, **settings):
    """A training step, measured."""
    x, y = batch()
    with Probe(model, **settings) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    return probe.latest


def assert_alike(found, expected):
    assert list(found) == list(expected)
    assert found.skipped == expected.skipped == {}
    assert found.neurons == expected.neurons
    for name, layer in expected.items():
        for side in ("input", "output_grad"):
            a, b = getattr(found[name], side), getattr(layer, side)
            assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-9, atol=1e-12 * b.lambda_max)
            assert a.rows == b.rows
        for norm in ("weight", "weight_grad"):
            if getattr(layer, norm) is not None:
                assert getattr(found[name], norm) == pytest.approx(getattr(layer, norm), rel=1e-9)
        assert (found[name].samples, found[name].positions) == (layer.samples, layer.positions)


@pytest.mark.parametrize("use", list(USES)[1:-1])
def test_a_layer_used_by_a_function_is_measured_as_if_it_were_called(use):
    assert_alike(measure(Network(use), batch()), measure(Network("called"), batch()))
    assert_alike(step(Network(use)), step(Network("called")))


@pytest.mark.parametrize("settings", [{"neurons": False, "weights": False}, {"bias": True}, {"layers": ["attn.*"]}])
def test_it_is_under_every_setting(settings):
    assert_alike(step(Network("function"), **settings), step(Network("called"), **settings))


def test_one_used_otherwise_is_said_to_be_used():
    for found in (measure(Network("product"), batch()), step(Network("product"))):
        assert list(found) == ["first", "head"]
        assert set(found.skipped) == {"attn.qkv", "attn.proj"}
        assert all("not called itself, though its weight is used" in why for why in found.skipped.values())


class Tied(nn.Module):
    """Two layers with one weight, the second of which is called by its module, or used by a function."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(5, 5), Holder(USES[use], 5), nn.Linear(5, 3)
        self.second.own.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).mean(1))


class Holder(nn.Module):
    def __init__(self, use, width):
        super().__init__()
        self.use, self.own = use, nn.Linear(width, width)

    def forward(self, x):
        return self.use(self.own, x)


def test_of_layers_that_share_a_weight_the_one_inside_the_running_module_is_meant():
    assert_alike(measure(Tied("function"), batch()), measure(Tied("called"), batch()))


class Attended(nn.MultiheadAttention):
    """Uses its packed weight itself, which other hooks see."""

    use = None

    def forward(self, x):
        q, k, v = F.linear(input=x, weight=self.in_proj_weight, bias=self.in_proj_bias).chunk(3, dim=-1)
        return USES[self.use](self.out_proj, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("use", ["called", "function", "keywords"])
def test_a_call_inside_a_layer_or_an_attention_counts_once(use):
    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Own(5, 6), Attended(6, 1, batch_first=True), nn.Flatten(), nn.Linear(42, 3)).double()
    model[1].use = use
    found = measure(model, batch())
    assert {name: (layer.samples, layer.input.rows, layer.output_grad.rows) for name, layer in found.items()} == {
        "0": (8, 56, 56),
        "1.in_proj": (8, 56, 56),
        "1.out_proj": (8, 56, 56),
        "3": (8, 8, 8),
    }


class Normed(nn.Module):
    """Batch statistics by modules, or by the function as networks with generated weights have it."""

    def __init__(self, by):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm1d(4, affine=False) for _ in range(2 if by == "module" else 0)])
        self.double()

    def norm(self, number, h):
        return self.norms[number](h) if self.norms else F.batch_norm(h, None, None, None, None, True)

    def forward(self, x):
        return self.head(self.norm(1, self.second(self.norm(0, self.first(x)).relu())).tanh())


def test_batch_statistics_of_a_function_are_those_of_a_module():
    x, y = torch.randn(7, 3).double(), torch.arange(7) % 3
    module, function = (measure(Normed(by), (x, y), labels="model") for by in ("module", "function"))
    for name in module:
        a, b = module[name].output_grad, function[name].output_grad
        torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "ggn"])
def test_so_they_are_in_exact_curvature(matrix):
    x, y = torch.randn(7, 3).double(), torch.arange(7) % 3
    for ask in (curvature, top_curvature):
        a, b = (ask(Normed(by), x, y, matrix) for by in ("module", "function"))
        a, b = (found.values if ask is top_curvature else found.eigenvalues for found in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)
