"""Layer classes whose forward does more than multiply: x and h are those of the product inside."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

from condzoo.probe import Probe, measure


class NormedConv(nn.Conv2d):
    """Detectron2's: a norm and an activation behind the convolution."""

    def __init__(self, *args, norm, activation, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        return self.activation(self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding)))


class NormedLinear(nn.Linear):
    """BitNet's: a norm before the product, with the weight or one that is computed from it."""

    def __init__(self, inputs, outputs, computed):
        super().__init__(inputs, outputs)
        self.norm, self.computed = nn.RMSNorm(inputs), computed

    def forward(self, x):
        return F.linear(self.norm(x), self.weight * 1.0 if self.computed else self.weight, self.bias)


class Quantized(nn.Linear):
    """torch's LinearReLU for quantization-aware training, whose weight is rounded."""

    def forward(self, x):
        weight = torch.fake_quantize_per_tensor_affine(self.weight, 2.0**-6, 0, -128, 127)
        return F.linear(x, weight, self.bias).relu()


class Rounded(nn.Linear):
    def forward(self, x):
        return F.linear(x, torch.fake_quantize_per_tensor_affine(self.weight, 2.0**-6, 0, -128, 127), self.bias)


class Activated(nn.Linear):
    """An activation behind a product that is written out."""

    def __init__(self, inputs, outputs, multiply):
        super().__init__(inputs, outputs)
        self.multiply = multiply

    def forward(self, x):
        return torch.tanh(self.multiply(x.flatten(0, -2), self.weight, self.bias)).unflatten(0, x.shape[:-1])


MULTIPLY = {
    "@": lambda x, weight, bias: x @ weight.T + bias,
    "addmm": lambda x, weight, bias: torch.addmm(bias, x, weight.t()),
}


class Transposed(nn.Conv1d):
    """Reads tokens [n, t, c]."""

    def forward(self, x):
        return super().forward(x.mT).mT


class Bytes(nn.Linear):
    """Reads bytes, and gives its bias beside its output."""

    def forward(self, x):
        return super().forward(x.double() / 255), self.bias


class Step(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def networks(kind):
    """A network with such a layer, the same one out of plain layers, and the layers' names in both."""
    torch.manual_seed(0)
    if kind == "conv":
        norm = nn.BatchNorm2d(6)
        nn.init.uniform_(norm.weight, 5, 10)
        first = NormedConv(3, 6, 3, padding=1, norm=norm, activation=partial(F.relu, inplace=True))
        parts = [nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU()]
        x, width = torch.randn(8, 3, 5, 5), 150
    elif kind in MULTIPLY:
        first, parts = Activated(4, 5, MULTIPLY[kind]), [nn.Linear(4, 5), nn.Tanh()]
        x, width = torch.randn(9, 3, 4), 15
    elif kind == "transposed":
        swap = Step(lambda x: x.mT)
        first, parts = Transposed(4, 5, 2), [swap, nn.Conv1d(4, 5, 2), swap]
        x, width = torch.randn(9, 6, 4), 25
    elif kind == "quantized":
        first, parts = Quantized(4, 5), [Rounded(4, 5), nn.ReLU()]
        x, width = torch.randn(9, 3, 4), 15
    elif kind == "bytes":
        first, parts = Bytes(4, 5), [Step(lambda x: x.double() / 255), nn.Linear(4, 5), nn.Identity()]
        x, width = torch.randint(255, (9, 3, 4), dtype=torch.uint8), 15
    else:
        first = NormedLinear(4, 5, computed=kind == "computed")
        parts = [first.norm, nn.Linear(4, 5)]
        x, width = 10 * torch.randn(9, 3, 4), 15
    rest = [nn.Flatten(), nn.Linear(width, 3)]
    after = [Step(lambda pair: pair[0])] if kind == "bytes" else []
    own, plain = nn.Sequential(first, *after, *rest).double(), nn.Sequential(*parts, *rest).double()
    place = next(i for i, part in enumerate(plain) if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Linear)))
    plain[place].load_state_dict(first.state_dict(), strict=False)
    names = {"0": str(place), str(len(own) - 1): str(len(plain) - 1)}
    return own, plain, names, (x if kind == "bytes" else x.double(), torch.arange(len(x)) % 3)


def step(model, batch):
    with Probe(model) as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        probe.step()
    return probe.latest


def assert_alike(found, expected):
    for side in ("input", "output_grad"):
        a, b = getattr(found, side), getattr(expected, side)
        assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-9, atol=1e-12 * b.lambda_max)
        assert a.rows == b.rows
    assert (found.samples, found.positions) == (expected.samples, expected.positions)


@pytest.mark.parametrize("kind", ["conv", "linear", "computed", "transposed", "bytes", "quantized", *MULTIPLY])
def test_a_norm_inside_a_layer_is_as_one_beside_it(kind):
    own, plain, names, batch = networks(kind)
    for run in (measure, partial(measure, conv="patches"), step):
        found, expected = run(own, batch), run(plain, batch)
        assert found.skipped == expected.skipped == {}
        for name, other in names.items():
            assert_alike(found[name], expected[other])


class Causal(nn.Conv1d):
    """Pads on both sides and cuts off what has seen the future."""

    def forward(self, x):
        return super().forward(x)[..., : -self.padding[0]]


class Padded(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class LowRank(nn.Linear):
    """LoRA's, with its weight stored transposed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        h = F.linear(x, self.weight.T, self.bias)
        h += x @ self.down.T @ self.up.T
        return h


class InParts(nn.Linear):
    def forward(self, x):
        return torch.cat([F.linear(part, self.weight, self.bias) for part in x.chunk(3)])


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).mT @ x.flatten(0, -2)


class OwnBackward(nn.Linear):
    def forward(self, x):
        return Product.apply(x, self.weight)


class Multiplied(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


KEPT = {
    "same": (lambda: StdConv2d(3, 4, 3, padding=1), (3, 5, 5)),
    "scaled": (lambda: ScaledStdConv2d(3, 4, 3), (3, 5, 5)),
    "causal": (lambda: Causal(3, 4, 3, padding=2), (3, 6)),
    "padded": (lambda: Padded(3, 4, 3), (3, 6)),
    "cast": (lambda: Cast(4, 4), (5, 4)),
    "low rank": (lambda: LowRank(4, 4), (5, 4)),
    "in parts": (lambda: InParts(4, 4), (5, 4)),
    "own backward": (lambda: OwnBackward(4, 4), (5, 4)),
    "multiplied": (lambda: Multiplied(4, 4), (5, 4)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_layer_does_beside_a_norm_leaves_its_own_input_and_output(kit, kind):
    build, shape = KEPT[kind]
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(9, *shape).double()
    h = layer(x).detach().requires_grad_()
    head = nn.Linear(h[0].numel(), 3).double()
    y = torch.arange(9) % 3
    (9 * F.cross_entropy(head(h.flatten(1)), y)).backward()
    spatial = not isinstance(layer, nn.Linear)
    expected = [kit.rows_of(x, spatial), kit.rows_of(h.grad, spatial)]
    for run in (measure, step):
        found = run(nn.Sequential(layer, nn.Flatten(), head), (x, y))
        assert found.skipped == {}
        for spectrum, rows in zip((found["0"].input, found["0"].output_grad), expected, strict=True):
            values = kit.eigenvalues(rows, 1, len(rows))
            rtol = 1e-5 if kind == "cast" else 1e-9
            assert torch.allclose(spectrum.eigenvalues, values, rtol=rtol, atol=rtol * float(values[0]))


class Fused(nn.Conv2d):
    """torch's ConvBn2d for quantization-aware training: the weight is scaled by the norm's factor, the output back."""

    def forward(self, x):
        scale = torch.arange(1.0, 5.0).to(x)[:, None, None]
        return (F.conv2d(x, self.weight * scale[..., None], None, self.stride, self.padding) / scale).relu()


def test_a_layer_whose_h_is_not_known_is_skipped_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(Fused(3, 4, 3), nn.Flatten(), nn.Linear(36, 3)).double()
    batch = torch.randn(8, 3, 5, 5).double(), torch.arange(8) % 3
    for found in (measure(model, batch), step(model, batch)):
        assert list(found) == ["2"]
        assert found.skipped == {"0": "a Fused whose output is changed inside its forward: its rows are not seen"}
