"""The last BN as a layer: gamma, the batch it needs, and loading the plain network's weights."""

import copy
import pickle

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from condzoo.models import create_model
from condzoo.models.last_bn import accept_plain_weights, build_last_bn, check_batch, reset_to_identity_


class Net(nn.Module):
    """The smallest network that can have a last BN."""

    def __init__(self, last_bn: bool) -> None:
        super().__init__()
        self.body, self.norm, self.fc = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        if last_bn:
            self.last_bn = build_last_bn(6, "uniform")
            accept_plain_weights(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, 4] -> [B, 3]
        h = self.norm(self.body(x)).relu()
        return self.fc(self.last_bn(h) if hasattr(self, "last_bn") else h)


def trained_statistics_(net: nn.Module) -> nn.Module:
    """Give a network's last BN values that are no identity."""
    for t in (net.last_bn.weight, net.last_bn.bias, net.last_bn.running_mean, net.last_bn.running_var):
        nn.init.uniform_(t, 0.5, 2.0)
    return net


def test_gamma_is_ones_or_uniform():
    ones, uniform = build_last_bn(4096), build_last_bn(4096, "uniform")
    assert torch.equal(ones.weight, torch.ones(4096))
    assert uniform.weight.min() >= 0
    assert uniform.weight.max() < 1
    # mean and variance of U(0, 1) within 4 standard errors; Var[(u - 1/2)^2] = 1/180
    assert abs(uniform.weight.mean() - 0.5) < 4 * (1 / 12 / 4096) ** 0.5
    assert abs(uniform.weight.var() - 1 / 12) < 4 * (1 / 180 / 4096) ** 0.5
    for bn in (ones, uniform):
        assert torch.equal(bn.bias, torch.zeros(4096))
        assert isinstance(bn, nn.BatchNorm1d)


def test_builds_on_meta():
    with torch.device("meta"):
        assert build_last_bn(8, "uniform").weight.is_meta


def test_an_unknown_gamma_names_the_closest():
    with pytest.raises(
        ValueError, match=r"unknown last_bn_init 'unifrom'; did you mean 'uniform'\? one of: ones, uniform"
    ):
        build_last_bn(4, "unifrom")


def test_a_batch_of_one_is_rejected_in_training_mode_only():
    with pytest.raises(
        ValueError, match=r"at least 2 examples in training mode, got a batch of 1; call model.eval\(\)"
    ):
        check_batch(torch.ones(1, 4), nn.BatchNorm1d(4))
    check_batch(torch.ones(1, 4), nn.BatchNorm1d(4).eval())
    check_batch(torch.ones(1, 4), nn.SyncBatchNorm(4))
    check_batch(torch.ones(2, 4), nn.BatchNorm1d(4))
    check_batch(torch.ones(0, 4), nn.BatchNorm1d(4))


def test_reset_to_identity_is_the_identity_in_eval_mode():
    bn = reset_to_identity_(trained_statistics_(Net(True)).last_bn).eval()
    x = 100 * torch.randn(7, 6)
    torch.testing.assert_close(bn(x), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights_load_and_keep_the_function(strict: bool):
    plain, net, x = Net(False).eval(), trained_statistics_(Net(True)).eval(), torch.randn(5, 4)
    report = net.load_state_dict(plain.state_dict(), strict=strict)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-6, atol=1e-6)
    assert not report.missing_keys
    assert not report.unexpected_keys


def test_plain_weights_from_before_batchnorm_counted_load_too():
    plain, net, x = Net(False).eval(), trained_statistics_(Net(True)).eval(), torch.randn(5, 4)
    old = {key: value for key, value in plain.state_dict().items() if "num_batches" not in key}
    net.load_state_dict(old)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-6, atol=1e-6)


def test_own_weights_load_as_they_are():
    source = trained_statistics_(Net(True))
    net = Net(True)
    net.load_state_dict(source.state_dict())
    for key, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


@pytest.mark.parametrize("lost", ["last_bn.running_mean", "fc.weight"])
def test_a_broken_state_dict_is_still_an_error(lost: str):
    state = Net(True).state_dict()
    del state[lost]
    with pytest.raises(RuntimeError, match=lost):
        Net(True).load_state_dict(state)


def test_a_part_of_the_weights_leaves_the_last_bn_alone():
    net = trained_statistics_(Net(True))
    before = copy.deepcopy(net.last_bn.state_dict())
    net.load_state_dict({"fc.bias": torch.zeros(3)}, strict=False)
    for key, value in before.items():
        assert torch.equal(net.last_bn.state_dict()[key], value), key


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_accepts_plain_weights_and_leaves_the_original_alone(clone):
    net = trained_statistics_(Net(True)).eval()
    before = net.last_bn.weight.clone()
    twin, plain, x = clone(net), Net(False).eval(), torch.randn(5, 4)
    twin.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(twin(x), plain(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(net.last_bn.weight, before)


def test_plain_weights_load_into_a_submodule_and_onto_meta():
    plain, x = Net(False).eval(), torch.randn(5, 4)
    with torch.device("meta"):
        wrapped = nn.Sequential(Net(True))
    wrapped.load_state_dict({f"0.{key}": value for key, value in plain.state_dict().items()}, assign=True)
    torch.testing.assert_close(wrapped.eval()(x), plain(x), rtol=1e-6, atol=1e-6)


def test_a_frozen_or_synchronized_last_bn_takes_one_image():
    model = create_model("cifar_resnet8_lastbn").train()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="needs at least 2 examples"):
        model(x)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert model(x).shape == (1, 10)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(create_model("cifar_resnet8_lastbn"))
    synchronized.load_state_dict(create_model("cifar_resnet8").state_dict())


TRACED = ["cifar_resnet8_lastbn", "cifar_vgg8_nobn_lastbn", "mlp4x24_lastbn", "resnet18_lastbn"]


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("training", [True, False])
def test_networks_with_a_last_bn_can_be_traced(name, training):
    model = create_model(name).train(training)
    size = getattr(model, "input_size", (3, 32, 32))
    x = torch.randn(2, *size)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(traced(x), model(x))
