"""Dying and full units, against counts by comparing the outputs themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from condzoo.probe import Probe, measure

UNITS = 5


class Preset(nn.Module):
    """Linear layer whose units are, on standard-normal inputs: always off, always on, mixed, mixed, large."""

    def __init__(self, relu):
        super().__init__()
        self.first, self.head, self.relu = nn.Linear(4, UNITS), nn.Linear(UNITS, 3), relu
        with torch.no_grad():
            self.first.bias.copy_(torch.tensor([-99.0, 99.0, 0.0, 0.1, 3.0]))

    def forward(self, x):
        return self.head(self.relu(self.first(x)))


def batch(samples=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((samples, 4), generator=generator), torch.randint(3, (samples,), generator=generator)


def preset(relu):
    torch.manual_seed(0)
    return Preset(relu)


def by_hand(model, flat, linear):
    h = model.first(batch()[0]).detach()
    return int(flat(h).all(0).sum()), int(linear(h).all(0).sum())


@pytest.mark.parametrize(
    ("relu", "flat", "linear"),
    [
        (nn.ReLU(), lambda h: h <= 0, lambda h: h > 0),
        (nn.ReLU(inplace=True), lambda h: h <= 0, lambda h: h > 0),
        (nn.ReLU6(), lambda h: (h <= 0) | (h >= 6), lambda h: (h > 0) & (h < 6)),
        (nn.Threshold(0.5, 0.0), lambda h: h <= 0.5, lambda h: h > 0.5),
        (nn.Threshold(0.0, 0.75), lambda h: h <= 0, lambda h: h > 0),
        (nn.Threshold(-0.5, 20.0), lambda h: h <= -0.5, lambda h: h > -0.5),
    ],
)
def test_units_of_a_module_are_counted_by_where_it_is_flat_and_linear(relu, flat, linear):
    model = preset(relu)
    found = measure(model, batch()).neurons["relu"]
    assert (found.units, found.rows) == (UNITS, 64)
    assert (found.dying, found.full) == by_hand(model, flat, linear)
    assert found.dying == (2 if isinstance(relu, nn.ReLU6) else 1)


def test_a_threshold_is_the_one_of_the_outputs_dtype():
    """0.1 is 0.1001 in bfloat16: units that give it are flat."""
    model, x = preset(nn.Threshold(0.1, 0.1)).bfloat16(), batch()[0].bfloat16()
    linear = model.first(x).detach() > torch.tensor(0.1, dtype=torch.bfloat16)
    found = measure(model, (x, batch()[1])).neurons["relu"]
    assert (found.dying, found.full) == (int((~linear).all(0).sum()), int(linear.all(0).sum()))
    assert found.dying == 1


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu()"),
        (lambda x: F.relu(x, inplace=True), "relu()"),
        (torch.relu, "relu()"),
        (torch.relu_, "relu()"),
        (lambda x: x.relu(), "relu()"),
        (lambda x: x.relu_(), "relu()"),
        (F.relu6, "relu6()"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_functional_ones_are_counted_like_modules(function, name, training):
    relu = nn.ReLU6() if name == "relu6()" else nn.ReLU()
    expected = measure(preset(relu), batch()).neurons["relu"]
    model = preset(function)
    if training:
        with Probe(model) as probe:
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            probe.step()
        assert probe.latest.neurons == {name: expected}
    else:
        assert measure(model, batch()).neurons == {name: expected}
    assert not _get_current_function_mode_stack()


def test_every_call_in_a_forward_has_its_own_units_and_every_batch_adds_to_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow, self.head = nn.Linear(4, 7), nn.Linear(7, 5), nn.Linear(5, 3)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.head(F.relu(self.relu(self.narrow(torch.relu(self.relu(self.wide(x)))))))

    x, y = batch()
    found = measure(Twice(), [(x[:40], y[:40]), (x[40:], y[40:])]).neurons
    assert {n: (u.units, u.rows) for n, u in found.items()} == {
        "relu": (7, 64),
        "relu()": (7, 64),
        "relu#1": (5, 64),
        "relu()#1": (5, 64),
    }


def test_a_relu_over_a_changing_number_of_units_is_skipped():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(4, 1)

        def forward(self, x):  # [n, tokens, 4]
            return F.relu(self.score(x)[..., 0]).sum(1)

    model = Tokens()
    with Probe(model, every=1) as probe:
        for tokens in (5, 9):
            x = torch.randn(6, tokens, 4)
            x[:, 0] = 0  # a unit whose state stays open, so that both batches are looked at
            model(x).sum().backward()
        probe.step()
    assert probe.latest.neurons == {}
    assert probe.latest.skipped == {"relu()": "a ReLU whose number of units differs from call to call"}
    assert list(probe.latest) == ["score"]


def test_activations_that_are_flat_nowhere_are_not_counted():
    for activation in (nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.ELU(), nn.PReLU()):
        assert measure(preset(activation), batch()).neurons == {}


def test_the_mode_is_left_when_the_forward_raises():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = preset(F.relu)

        def forward(self, x):
            self.inner(x)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        measure(Failing(), batch())
    assert not _get_current_function_mode_stack()


def test_torchvisions_one_relu_for_three_widths():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet.Bottleneck(8, 2)
    net = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    found = measure(net, (torch.randn(6, 8, 5, 5), torch.randint(3, (6,)))).neurons
    assert {n: u.units for n, u in found.items()} == {"0.relu": 2, "0.relu#1": 2, "0.relu#2": 8}


class Waves(nn.Module):
    """Two convolutions over time and a head; unit 1 of each ReLU is always off."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv1d(1, 4, 3), nn.ReLU()
        self.conv2, self.head = nn.Conv1d(4, 4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            for conv in (self.conv1, self.conv2):
                conv.bias[1] = -99.0

    def forward(self, x):
        return self.head(F.relu(self.conv2(self.relu1(self.conv1(x[:, None])))).mean(2))


@pytest.mark.parametrize("layers", [None, ["head"], ["conv1"]])
def test_units_after_convolutions_over_time_are_channels_whichever_layers_are_measured(layers):
    torch.manual_seed(0)
    model = Waves()
    x = torch.randn(64, 12)
    found = measure(model, (x, torch.randint(3, (64,))), layers=layers).neurons
    assert {name: (units.units, units.dying, units.rows) for name, units in found.items()} == {
        "relu1": (4, 1, 640),
        "relu()": (4, 1, 512),
    }


def test_units_after_a_linear_layer_on_images_with_channels_last_are_the_last_dimension():
    class Net(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.stem, self.mlp = nn.Conv2d(2, 4, 1), nn.Linear(4, 7)
            self.relu, self.conv = nn.ReLU(), nn.Conv2d(7, 3, 1) if conv else None
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            h = self.relu(self.mlp(self.stem(x).permute(0, 2, 3, 1)))
            if self.conv is not None:
                return self.relu(self.conv(h.permute(0, 3, 1, 2))).mean((2, 3))
            return self.head(h.mean((1, 2)))

    torch.manual_seed(0)
    x, y = torch.randn(6, 2, 5, 5), torch.randint(3, (6,))
    found = measure(Net(False), (x, y)).neurons["relu"]
    assert (found.units, found.rows) == (7, 6 * 25)
    both = measure(Net(True), (x, y)).neurons
    assert (both["relu"].units, both["relu#1"].units) == (7, 3)


class Gated(nn.Module):
    """A convolution over time whose channels are scaled by a linear gate [n, c] before the ReLU; channel 1 is off."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.gate = nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.conv.bias[1] = -99.0

    def forward(self, x):
        h = self.conv(x)
        return self.head(self.relu(h * self.gate(h.mean(2)).sigmoid()[:, :, None]).mean(2))


class Turned(nn.Module):
    """A linear layer on [n, t, d] whose output is transposed before the ReLU; unit 1 is off."""

    width = 8

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.head = nn.Linear(4, self.width), nn.ReLU(), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.bias[1] = -99.0

    def forward(self, x):
        return self.head(self.relu(self.first(x.mT).mT).mean(2))


class Halved(Turned):
    """Half of the linear layer's outputs pass the ReLU, as gated units have it."""

    width = 16

    def forward(self, x):
        gated, gate = self.first(x.mT).chunk(2, dim=2)
        return self.head((self.relu(gated) * gate).mean(1))


@pytest.mark.parametrize("model", [Gated, Turned, Halved])
@pytest.mark.parametrize("steps", [16, 50])
def test_units_of_three_dimensions_after_a_linear_layer_are_its_outputs(model, steps):
    torch.manual_seed(0)
    x = torch.randn(16, 8 if model is Gated else 4, steps)
    found = measure(model(), (x, torch.randint(3, (16,)))).neurons["relu"]
    assert (found.units, found.dying, found.rows) == (8, 1, 16 * steps)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
def test_units_of_images_that_come_without_a_batch_dimension_are_channels(conv):
    class PerImage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = conv(3, 4, 3), nn.ReLU(), nn.Linear(4, 3)
            with torch.no_grad():
                self.conv.bias[1] = -99.0

        def forward(self, x):
            return self.head(torch.stack([self.relu(self.conv(image)).flatten(1).mean(1) for image in x]))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 11) if conv is nn.Conv2d else torch.randn(2, 3, 11)
    found = measure(PerImage(), (x, torch.randint(3, (2,)))).neurons
    positions = 63 if conv is nn.Conv2d else 9
    assert {name: (u.units, u.dying, u.rows) for name, u in found.items()} == {
        "relu": (4, 1, positions),
        "relu#1": (4, 1, positions),
    }
