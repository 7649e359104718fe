"""validate holds the zoo's promises, and catches a network that breaks one, by the right check."""

import pytest
import torch
from torch import nn

from condzoo.models import create_model, init_weights
from condzoo.validation import validate

ONE_A_FAMILY = [
    "cifar_resnet20",
    "cifar_resnet14_nobn",
    "cifar_resnet20_nobn_lastbn",
    "cifar_preresnet14_lastbn",
    "cifar_preresnet14_nofinalbn",
    "cifar_vgg14_nobn",
    "cifar_vgg16_lastbn",
    "mlp8x24",
    "mlp20x256_bn",
    "mlp8x24_lastbn",
    "resnet18_lastbn",
    "preresnet18",
]


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_model_of_each_family_keeps_its_promises(name):
    validation = validate(name)
    assert validation.ok, validation.table()
    assert ("last BN" in {check.name for check in validation.checks}) == name.endswith("lastbn")


def broken(checks):
    return {check.name for check in checks if not check.ok}


def without_he(model):
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.reset_parameters()


class AffineOnly(nn.Module):
    """BN's parameters without its normalization."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def without_normalization(model):
    model.layer2[0].bn2 = AffineOnly(32)


def last_bn_skipped(model):
    model.has_last_bn = False


class Late(nn.Module):
    """BN on the logits, where it does nothing for the classifier's input."""

    def __init__(self, fc):
        super().__init__()
        self.fc, self.bn = fc, nn.BatchNorm1d(10)

    def forward(self, x):
        return self.bn(self.fc(x))


def last_bn_after_the_classifier(model):
    model.has_last_bn = False
    model.fc = Late(model.fc)


def one_channel_more(model):
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=True)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")


def a_nan(model):
    model.layer1[0].conv1.weight.data[0, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("name", "damage", "check"),
    [
        ("cifar_resnet14", without_he, "weights"),
        ("cifar_vgg20_nobn", without_he, "signals"),
        ("cifar_resnet14", without_normalization, "scaling"),
        ("cifar_resnet14_lastbn", last_bn_skipped, "last BN"),
        ("cifar_resnet14_lastbn", last_bn_skipped, "finite"),
        ("cifar_resnet14_nobn_lastbn", last_bn_after_the_classifier, "last BN"),
        ("cifar_resnet14", one_channel_more, "size"),
        ("cifar_resnet14", a_nan, "finite"),
    ],
)
def test_a_broken_model_is_caught_by_the_check_it_breaks(name, damage, check):
    torch.manual_seed(0)
    model = create_model(name)
    assert validate(model).ok
    damage(model)
    assert check in broken(validate(model).checks)


def test_another_initializer_than_the_familys_is_caught():
    torch.manual_seed(0)
    assert {"weights", "signals"} <= broken(validate(init_weights(create_model("mlp8x24"), "he")).checks)


def test_the_model_is_left_as_it_was():
    model = create_model("cifar_resnet8_lastbn").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    validate(model)
    assert not model.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_network_that_is_not_of_the_zoo_has_no_promises():
    with pytest.raises(ValueError, match="Linear is not a network of the zoo; validate takes a name or one of those"):
        validate(nn.Linear(2, 2))
