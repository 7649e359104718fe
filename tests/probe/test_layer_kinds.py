"""Every kind of layer, alone, shared and called only sometimes, against rows written out one by one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2dSame
from torch import nn

from condzoo.probe import Probe, curvature, measure

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear on tokens": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear on maps": (lambda: nn.Linear(4, 3, bias=False), (2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=3, padding_mode="circular"), (4, 9)),
    "grouped conv1d": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 2)), (3, 6, 5)),
    "1x1 conv2d, strided": (lambda: nn.Conv2d(3, 4, 1, stride=2, bias=False), (3, 6, 5)),
    "same conv2d": (lambda: nn.Conv2d(3, 2, 3, padding="same", padding_mode="replicate"), (3, 5, 5)),
    "grouped conv2d": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (6, 4, 4)),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), (4, 5, 5)),
    "depthwise conv2d, twice the channels": (lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 1), dilation=(1, 1, 2), padding=1), (2, 3, 4, 4)),
    "grouped conv3d": (lambda: nn.Conv3d(4, 2, 2, groups=2), (4, 3, 3, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, output_padding=1), (3, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2, padding=1), (4, 3, 4)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2, groups=2), (2, 2, 3, 2)),
}


class Around(nn.Module):
    """Calls its layer as often as asked for, each time on another transformation of the input."""

    def __init__(self, layer, calls):
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x):
        return torch.stack([self.layer((k + 1) * (x + k).tanh()).sin() for k in range(self.calls)])


def loss(output, target):
    return (output.flatten(2) ** 2).sum((0, 2))  # one number a sample


def expected(kit, layer, inputs, conv, bias):
    """Eigenvalues from all rows: the layer's inputs as it reads them, and B times its outputs' gradients."""
    spatial, groups = not isinstance(layer, nn.Linear), getattr(layer, "groups", 1)
    patches = conv == "patches" and spatial and "Transpose" not in type(layer).__name__
    input_rows, grad_rows = [], []
    for x in inputs:
        h = layer(x).detach().requires_grad_()
        loss(h.sin()[None], None).sum().backward()  # B times the mean
        grad_rows.append(kit.rows_of(h.grad, spatial))
        input_rows.append(kit.patch_rows(layer, x).flatten(1) if patches else kit.rows_of(x, spatial))
    x, g = torch.cat(input_rows), torch.cat(grad_rows)
    if bias and layer.bias is not None:
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        x = torch.cat([part for block in x.chunk(groups, dim=1) for part in (block, ones)], dim=1)
    return kit.eigenvalues(x, groups, len(x)), kit.eigenvalues(g, groups, len(g)), len(x)


def check(kit, layer, found, inputs, conv, bias):
    x, g, rows = expected(kit, layer, inputs, conv, bias)
    for spectrum, values in ((found.input, x), (found.output_grad, g)):
        assert spectrum.eigenvalues.shape == values.shape
        assert float((spectrum.eigenvalues - values).abs().max()) <= 1e-10 * float(values.max())
    assert found.input.rows == rows
    assert found.samples == sum(len(x) for x in inputs)


def drawn(shape, samples, seed=0):
    return torch.randn((samples, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("conv", ["channels", "patches"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_called_twice_over_batches_of_different_sizes(kit, name, conv, bias):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    batches = [drawn(shape, 7), drawn(shape, 2, seed=1)]
    found = measure(Around(layer, 2), [(x, x) for x in batches], loss=loss, conv=conv, bias=bias)
    inputs = [(k + 1) * (x + k).tanh() for x in batches for k in range(2)]
    check(kit, layer, found["layer"], inputs, conv, bias)


@pytest.mark.parametrize("name", ["linear", "grouped conv2d", "transposed conv1d"])
def test_a_layer_called_only_sometimes_is_measured_over_the_batches_that_call_it(kit, name):
    class Sometimes(Around):
        def forward(self, x):
            return super().forward(x) if len(x) > 4 else (self.always * x).flatten(1).sin()[None]

        always = nn.Parameter(torch.ones(()).double())

    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    x, few = drawn(shape, 6), drawn(shape, 3, seed=1)
    found = measure(Sometimes(layer, 1), [(few, few), (x, x), (few, few)], loss=loss)
    assert found.samples == 12
    check(kit, layer, found["layer"], [x.tanh()], "channels", False)
    gradient = torch.autograd.grad(loss(Around(layer, 1)(x), None).mean(), layer.weight)[0]
    mean = gradient * 6 / 12  # of the loss over all 12 samples
    assert found["layer"].weight_grad_frobenius == pytest.approx(float(mean.norm()), rel=1e-10)


def test_a_shared_layer_whose_maps_differ_in_size_counts_every_position_once(kit):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 3, padding=1).double()

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.cat([self.layer(x).sin().flatten(1), self.layer(x[:, :, ::2, ::2]).sin().flatten(1)], dim=1)[
                None
            ]

    x = drawn((3, 8, 8), 5)
    for conv in ("channels", "patches"):
        found = measure(Pyramid(), (x, x), loss=loss, conv=conv)["layer"]
        check(kit, layer, found, [x, x[:, :, ::2, ::2]], conv, False)


@pytest.mark.parametrize("make", [Conv2dSame, StdConv2dSame, ScaledStdConv2dSame])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 3, 1), (9, 5, 2), (6, 2, 2)])
def test_patches_of_convolutions_that_pad_inside_are_those_they_see(kit, make, size, kernel, stride):
    """TensorFlow's SAME, as timm's tf_ networks have it: one side gets the odd pixel."""
    torch.manual_seed(0)
    conv = make(3, 4, kernel, stride=stride, bias=False)
    model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(4))
    x, y = torch.randn(5, 3, size, size), torch.randint(4, (5,))
    model(x)
    model, x = model.double(), x.double()
    found = measure(model, (x, y), conv="patches")
    out = -(-size // stride)
    total = max(0, (out - 1) * stride + kernel - size)
    frame = F.pad(x, (total // 2, total - total // 2) * 2)
    rows = kit.patch_rows(nn.Conv2d(3, 4, kernel, stride=stride), frame).flatten(1)
    assert len(rows) == 5 * out * out
    expected = kit.eigenvalues(rows, 1, len(rows))
    assert torch.allclose(found["0"].input.eigenvalues, expected, rtol=1e-9, atol=1e-12 * float(expected[0]))


class Causal(nn.Conv1d):
    """Pads the past alone."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


def test_patches_that_cannot_be_known_are_skipped_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(Causal(2, 3, 3), nn.Flatten(), nn.Linear(24, 4)).double()
    batch = torch.randn(30, 2, 8).double(), torch.randint(4, (30,))
    found = measure(model, batch, conv="patches")
    assert found.skipped == {"0": "Causal pads its input in a way of its own: its patches are not seen"}
    assert list(found) == ["2"]
    assert list(measure(model, batch)) == ["0", "2"]
    padded = nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(2, 3, 3), *model[1:]).double()
    padded[1].load_state_dict(model[0].state_dict())
    exact, expected = curvature(model, *batch, "grad_moment"), curvature(padded, *batch, "grad_moment")
    assert torch.allclose(exact.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-13), "by the gradients themselves"


def test_a_model_on_a_device_without_float64_is_refused():
    """No such device is here: a parameter that says it is on one."""

    class OnMps(nn.Linear):
        def parameters(self, recurse=True):
            yield SimpleNamespace(device=torch.device("mps", 0))

    for call in (lambda m: measure(m, (torch.ones(2, 3), torch.zeros(2).long())), Probe):
        with pytest.raises(ValueError, match=r"the model is on MPS, which has no float64.* use model\.to\('cpu'\)"):
            call(OnMps(3, 3))


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian"])
def test_a_linear_layer_with_its_weight_transposed_has_the_same_curvature(matrix):
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model, plain = (
        nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3)).double() for first in (kind(4, 5), nn.Linear(5, 4))
    )
    plain.load_state_dict({key: value.mT if key == "0.weight" else value for key, value in model.state_dict().items()})
    x, y = torch.randn(8, 5).double(), torch.arange(8) % 3
    for block in (None, "0"):
        found, expected = (curvature(m, x, y, matrix, block=block).eigenvalues for m in (model, plain))
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected[0])


class Experts(nn.Module):
    """A mixture's experts as one tensor each, as Hugging Face's are: the activation is the one module inside."""

    def __init__(self, activation):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))
        self.activation = activation

    def forward(self, x):
        h = self.activation(torch.einsum("nd,edo->eno", x, self.up))
        return torch.einsum("eno,eod->end", h, self.down).mean(0)


class Positioned(nn.Module):
    """A table of positions beside layers."""

    def __init__(self):
        super().__init__()
        self.positions, self.layer, self.drop = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 4), nn.Dropout()

    def forward(self, x):
        return self.drop(self.layer(x + self.positions))


@pytest.mark.parametrize("activation", [nn.GELU(), F.gelu])
def test_matrices_beside_an_activation_are_skipped_by_name_and_tables_beside_layers_are_not(activation):
    last = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))  # its matrix is in a module beside one without any
    model = nn.Sequential(nn.Linear(5, 4), Experts(activation), Positioned(), last)
    found = measure(model, (torch.randn(9, 5), torch.arange(9) % 3))
    assert list(found) == ["0", "2.layer", "3"]
    assert found.skipped == {"1": "Experts is not a linear or convolution layer"}


class Noisy(nn.Module):
    """A bias that is drawn anew each time it is read."""

    def forward(self, bias):
        return bias + 0.1 * torch.randn_like(bias)


def test_a_bias_that_is_computed_is_not_computed_once_more():
    ends = []
    for probed in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        nn.utils.parametrize.register_parametrization(layer, "bias", Noisy())
        with Probe(layer, every=1 if probed else 0, bias=True) as probe:
            for _ in range(2):
                layer(torch.randn(8, 4)).square().mean().backward()
                probe.step()
        ends.append(layer.weight.grad)
        assert not probed or probe.latest[""].input.dim == 5
    assert torch.equal(*ends)
