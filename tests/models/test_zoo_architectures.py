"""Each architecture against a formulation of its own: functions over the state dict, no modules of the zoo.

The twins under test are wrong on purpose in one place; the right formulation must tell them apart.
"""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from condzoo.models import create_model
from condzoo.models.last_bn import reset_to_identity_

State = dict[str, Tensor]


def randomized(name: str, **options) -> nn.Module:
    """A network in float64 and eval mode with no parameter or statistic at its trivial value."""
    torch.manual_seed(0)
    model = create_model(name, **options).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for t in (module.weight, module.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
            for t in (module.bias, module.running_mean):
                nn.init.normal_(t, std=0.2)
    nn.init.normal_(model.fc.bias)
    return model


def bn(state: State, name: str, x: Tensor) -> Tensor:
    """Evaluation-mode BatchNorm by its formula; the input itself where the network has no such layer."""
    if f"{name}.weight" not in state:
        return x
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, gamma, beta = (
        state[f"{name}.{part}"].view(shape) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution without bias, padded to keep the size."""
    w = state[f"{name}.weight"]
    return F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)


def option_a(x: Tensor, channels: int) -> Tensor:
    """He et al.'s option A, entry by entry: strided identity, the new channels zero behind the old."""
    if x.shape[1] == channels:
        return x
    out = torch.zeros(x.shape[0], channels, x.shape[2] // 2, x.shape[3] // 2, dtype=x.dtype)
    for c in range(x.shape[1]):
        out[:, c] = x[:, c, 0::2, 0::2]
    return out


def head(state: State, x: Tensor) -> Tensor:
    """Mean over positions, last BN where there is one, linear layer."""
    return bn(state, "last_bn", x.mean((2, 3))) @ state["fc.weight"].T + state["fc.bias"]


def cifar_resnet(state: State, x: Tensor, depth: int, shortcut: Callable | None = option_a) -> Tensor:
    """arXiv:1512.03385, sec. 4.2; `shortcut=None` is the VGG-style net."""
    x = bn(state, "bn1", conv(state, "conv1", x)).relu()
    for stage, channels in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
            h = bn(state, f"{name}.bn1", conv(state, f"{name}.conv1", x, stride)).relu()
            h = bn(state, f"{name}.bn2", conv(state, f"{name}.conv2", h))
            x = (h if shortcut is None else h + shortcut(x, channels)).relu()
    return head(state, x)


def cifar_preresnet(
    state: State, x: Tensor, depth: int, first_block_rule: bool = True, final_relu: bool = True
) -> Tensor:
    """arXiv:1603.05027: BN-ReLU-conv twice; the first block of a stage activates before the fork."""
    x = conv(state, "conv1", x)
    for stage, channels in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
            h = bn(state, f"{name}.bn1", x).relu()
            fork = h if block == 0 and first_block_rule else x
            h = bn(state, f"{name}.bn2", conv(state, f"{name}.conv1", h, stride)).relu()
            x = conv(state, f"{name}.conv2", h) + option_a(fork, channels)
    x = bn(state, "norm", x)
    return head(state, x.relu() if final_relu else x)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [8, 14, 20])
@pytest.mark.parametrize("suffix", ["", "_nobn", "_lastbn", "_nobn_lastbn"])
@torch.no_grad()
def test_cifar_resnet(suffix: str, depth: int):
    model = randomized(f"cifar_resnet{depth}{suffix}")
    assert same(model(images()), cifar_resnet(model.state_dict(), images(), depth))


@pytest.mark.parametrize("suffix", ["", "_nobn", "_lastbn", "_nobn_lastbn"])
@torch.no_grad()
def test_cifar_vgg_is_the_resnet_without_shortcuts(suffix: str):
    model = randomized(f"cifar_vgg14{suffix}")
    assert same(model(images()), cifar_resnet(model.state_dict(), images(), 14, shortcut=None))
    assert not same(model(images()), cifar_resnet(model.state_dict(), images(), 14))
    assert model.state_dict().keys() == create_model(f"cifar_resnet14{suffix}").state_dict().keys()


def pooled_option_a(x: Tensor, channels: int) -> Tensor:
    """A plausible mistake: averaging in place of striding."""
    return x if x.shape[1] == channels else F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, channels - x.shape[1]))


def centred_option_a(x: Tensor, channels: int) -> Tensor:
    """akamaster's padding: half of the new channels before the old ones."""
    quarter = (channels - x.shape[1]) // 2
    return x if not quarter else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))


def odd_option_a(x: Tensor, channels: int) -> Tensor:
    """A plausible mistake: the odd positions."""
    return x if x.shape[1] == channels else F.pad(x[:, :, 1::2, 1::2], (0, 0, 0, 0, 0, channels - x.shape[1]))


@pytest.mark.parametrize("mistake", [pooled_option_a, centred_option_a, odd_option_a, None])
@torch.no_grad()
def test_another_shortcut_is_another_function(mistake):
    model = randomized("cifar_resnet14")
    assert not same(model(images()), cifar_resnet(model.state_dict(), images(), 14, mistake))


@torch.no_grad()
def test_option_a_has_no_parameters_and_one_step_of_the_grid():
    shortcut = create_model("cifar_resnet8").layer2[0].shortcut
    assert not list(shortcut.parameters())
    assert isinstance(create_model("cifar_resnet8").layer1[0].shortcut, nn.Identity)
    x = torch.randn(2, 16, 8, 8)
    out = shortcut(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out, option_a(x, 32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 8])
def test_option_a_s_gradient_is_the_slice_s_in_the_memory_format_of_the_network(size: int, dtype: torch.dtype):
    x = torch.randn(2, 16, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = create_model("cifar_resnet8").layer2[0].shortcut(x)
    sent = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, sent)
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::2] = sent[:, :16]
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(gradient, expected)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("depth", [8, 14, 20])
@pytest.mark.parametrize("suffix", ["", "_nofinalbn", "_lastbn"])
@torch.no_grad()
def test_cifar_preresnet(suffix: str, depth: int):
    model = randomized(f"cifar_preresnet{depth}{suffix}")
    assert same(model(images()), cifar_preresnet(model.state_dict(), images(), depth))
    assert ("norm.weight" in model.state_dict()) == (suffix != "_nofinalbn")


@pytest.mark.parametrize("suffix", ["", "_nofinalbn", "_lastbn"])
@pytest.mark.parametrize("mistake", [{"first_block_rule": False}, {"final_relu": False}])
@torch.no_grad()
def test_another_wiring_of_the_preresnet_is_another_function(mistake: dict, suffix: str):
    model = randomized(f"cifar_preresnet14{suffix}")
    assert not same(model(images()), cifar_preresnet(model.state_dict(), images(), 14, **mistake))


@torch.no_grad()
def test_the_first_block_of_every_stage_activates_before_the_fork():
    model = randomized("cifar_preresnet14")
    for stage in (model.layer1, model.layer2, model.layer3):
        for block, sees_activated in ((stage[0], True), (stage[1], False)):
            inputs: list[Tensor] = []
            handle = block.shortcut.register_forward_pre_hook(
                lambda module, args, to=inputs: to.append(args[0].clone())
            )
            model(images())
            handle.remove()
            assert (inputs[0].min() >= 0) == sees_activated


@pytest.mark.parametrize(("name", "bottleneck"), [("preresnet18_lastbn", False), ("preresnet50", True)])
@torch.no_grad()
def test_imagenet_preresnet(name: str, bottleneck: bool):
    model = randomized(name)
    state, x = model.state_dict(), images(64)
    h = F.max_pool2d(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3) if bottleneck else (2, 2, 2, 2)):
        for block in range(blocks):
            at, stride = f"layer{stage + 1}.{block}", 2 if stage > 0 and block == 0 else 1
            a = bn(state, f"{at}.bn1", h).relu()
            fork = a if block == 0 else h
            if f"{at}.shortcut.weight" in state:
                fork = conv(state, f"{at}.shortcut", fork, stride)
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            for i, step in enumerate(strides, start=1):
                a = conv(state, f"{at}.conv{i}", a if i == 1 else bn(state, f"{at}.bn{i}", a).relu(), step)
            h = a + fork
    assert same(model(x), head(state, bn(state, "norm", h).relu()))


@torch.no_grad()
def test_cifar_vgg16_is_five_groups_of_three_convolutions():
    model = randomized("cifar_vgg16_lastbn")
    state, h = model.state_dict(), images()
    for group in range(1, 6):
        for i in (0, 3, 6):
            h = bn(state, f"group{group}.{i + 1}", conv(state, f"group{group}.{i}", h)).relu()
        h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    assert same(model(images()), head(state, h))


@pytest.mark.parametrize("suffix", ["", "_bn", "_lastbn"])
@torch.no_grad()
def test_mlp(suffix: str):
    model = randomized(f"mlp4x24{suffix}")
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    state, x = model.state_dict(), torch.randn(3, 1, 12, 12, dtype=torch.float64)
    h = x.reshape(3, 144)
    for k in range(3):
        at = f"layers.{k}"
        h = h @ state[f"{at}.linear.weight"].T + state.get(f"{at}.linear.bias", torch.zeros(24))
        h = bn(state, f"{at}.bn", h).clamp_min(0)
    assert same(model(x), bn(state, "last_bn", h) @ state["fc.weight"].T + state["fc.bias"])


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("source", ["timm", "torchvision"])
@torch.no_grad()
def test_plain_imagenet_weights_load_and_keep_the_outputs(source: str, depth: int):
    torch.manual_seed(0)
    build = timm.create_model if source == "timm" else torchvision.models.get_model
    plain = build(f"resnet{depth}").eval()
    for module in plain.modules():  # as after training: no statistic at its first value
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    model = create_model(f"resnet{depth}_lastbn", last_bn_init="uniform").eval()
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added == {
        f"last_bn.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert [key for key in model.state_dict() if key not in added] == list(plain.state_dict())
    report = model.load_state_dict(plain.state_dict(), strict=True)
    assert not report.missing_keys
    x = images(64).float()
    expected = plain(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6 * expected.abs().max())
    by_hand = copy.deepcopy(model)
    nn.init.constant_(by_hand.last_bn.bias, 1.0)
    assert not torch.allclose(by_hand(x), expected, rtol=1e-3)
    reset_to_identity_(by_hand.last_bn)
    torch.testing.assert_close(by_hand(x), expected, rtol=1e-6, atol=1e-6 * expected.abs().max())
