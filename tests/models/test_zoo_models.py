"""Every kind of network of the zoo, at its smallest depth: forward, backward, options, state dicts, precisions.

In the spirit of timm's own tests/test_models.py.
"""

import functools

import pytest
import torch
from torch import Tensor, nn

import condzoo
from condzoo.models import create_model
from condzoo.models.registry import FAMILIES

SMALLEST = [
    *(f"cifar_resnet8{s}" for s in ("", "_nobn", "_lastbn", "_nobn_lastbn")),
    *(f"cifar_preresnet8{s}" for s in ("", "_nofinalbn", "_lastbn")),
    *(f"cifar_vgg8{s}" for s in ("", "_nobn", "_lastbn", "_nobn_lastbn")),
    *("cifar_vgg16", "cifar_vgg16_lastbn"),
    *("resnet18_lastbn", "resnet50_lastbn"),
    *("preresnet18", "preresnet18_lastbn", "preresnet50"),
    *(f"mlp4x24{s}" for s in ("", "_bn", "_lastbn")),
]
LIGHT = [
    name for name in SMALLEST if "50" not in name and name not in ("cifar_vgg16", "cifar_vgg16_lastbn", "preresnet18")
]
# the rest differs from these in its number of blocks only
DEEP = [name for name in condzoo.list_models("*_lastbn") if 14 < condzoo.model_info(name).depth < 120]
DEEP = [name for name in DEEP if name not in SMALLEST]


def images(name: str, batch: int = 4, in_chans: int | None = None) -> Tensor:
    """Random images of the size a network is made for, ImageNet's shrunk to 32 x 32."""
    c, height, width = FAMILIES_OF[name].shared["input_size"]
    c, height, width = FAMILIES_OF[name].rows[name].get("input_size", (c, height, width))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, in_chans or c, min(height, 32), min(width, 32), generator=generator)


FAMILIES_OF = {name: family for family in FAMILIES.values() for name in family.rows}


@functools.cache
def model_of(name: str) -> nn.Module:
    """One network a name, for tests that do not change it."""
    torch.manual_seed(0)
    return create_model(name).eval()


@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_forward(name: str):
    x = images(name)
    y = model_of(name)(x)
    assert y.shape == (4, FAMILIES_OF[name].shared["num_classes"])
    assert y.isfinite().all()
    assert y.std() > 1e-3
    # in eval mode an example's output does not depend on its batch
    torch.testing.assert_close(model_of(name)(x[:1]), y[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_every_depth_runs_on_meta(name: str):
    with torch.device("meta"):
        model = create_model(name, num_classes=3)
        assert model(images(name, batch=2).to("meta")).shape == (2, 3)


@pytest.mark.parametrize("name", SMALLEST)
def test_backward_reaches_every_parameter(name: str):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5).train()
    loss = nn.functional.cross_entropy(model(images(name, batch=8)), torch.arange(8) % 5)
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_state_dict_round_trip(name: str, tmp_path):
    torch.save(model_of(name).state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(1)
    twin = create_model(name).eval()
    x = images(name)
    assert not torch.equal(twin(x), model_of(name)(x))
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(twin(x), model_of(name)(x))


@pytest.mark.parametrize("in_chans", [1, 2, 5])
@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_preresnet8", "cifar_vgg16", "mlp4x24", "resnet18_lastbn"])
@torch.no_grad()
def test_in_chans_and_num_classes(name: str, in_chans: int):
    model = create_model(name, in_chans=in_chans, num_classes=3).eval()
    assert model(images(name, in_chans=in_chans)).shape == (4, 3)
    assert model.num_classes == 3


@pytest.mark.parametrize("name", LIGHT)
def test_without_classes_the_features_come_out(name: str):
    torch.manual_seed(0)
    model = create_model(name, num_classes=0).eval()
    x = images(name)
    features = model(x)
    assert features.shape == (4, model.num_features)
    assert torch.equal(features, model.forward_head(model.forward_features(x), pre_logits=True))
    assert model.get_classifier(name_only=True) == "fc"
    assert not list(model.get_classifier().parameters())
    assert not any(key.startswith("fc.") for key in model.state_dict())


@pytest.mark.parametrize("name", [n for n in LIGHT if n.endswith("_lastbn")])
def test_dropout_comes_after_the_last_bn_and_only_in_training(name: str):
    model = create_model(name, drop_rate=0.5)
    assert model.drop_rate == 0.5
    order = []
    for part in ("last_bn", "head_drop", "fc"):
        getattr(model, part).register_forward_hook(lambda *_, part=part: order.append(part))
    x = images(name)
    seen = []
    model.fc.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.train()(x)
    assert order == ["last_bn", "head_drop", "fc"]
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7
    model.eval()(x)
    assert (seen[1] == 0).float().mean() < 0.3


@pytest.mark.parametrize("name", [n for n in LIGHT if n.endswith("_lastbn")])
def test_the_last_bn_standardizes_the_classifier_s_input(name: str):
    model = create_model(name).train()
    seen = []
    model.last_bn.register_forward_hook(lambda module, args, out: seen.append(args[0].double()))
    model.fc.register_forward_hook(lambda module, args, out: seen.append(args[0].double()))
    model(images(name, batch=16))
    variance = seen[0].var(0, correction=0)
    torch.testing.assert_close(seen[1].mean(0), torch.zeros_like(variance), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen[1].var(0, correction=0), variance / (variance + 1e-5), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["cifar_resnet8_lastbn", "cifar_preresnet8_lastbn", "resnet18_lastbn", "mlp4x24_lastbn"]
)
def test_a_batch_of_one_is_one_clear_error(name: str):
    model = create_model(name).train()
    # larger than elsewhere, so that no BN of the body sees a single position
    x = torch.randn(1, *((1, 12, 12) if name.startswith("mlp") else (3, 64, 64)))
    with pytest.raises(
        ValueError, match=r"at least 2 examples in training mode, got a batch of 1; call model.eval\(\)"
    ):
        model(x)
    model.eval()(x)


@pytest.mark.parametrize("name", [n for n in LIGHT if not n.startswith("mlp")])
@torch.no_grad()
def test_channels_last_changes_no_value(name: str):
    x = images(name)
    expected = model_of(name)(x)
    model = create_model(name).eval()
    model.load_state_dict(model_of(name).state_dict())
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-3 * expected.std()
    )


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_bf16_autocast_stays_near_float32(name: str):
    x = images(name, batch=8)
    expected = model_of(name)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model_of(name)(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "cifar_vgg8_nobn_lastbn", "cifar_preresnet8", "mlp4x24", "resnet18_lastbn"]
)
def test_init_is_that_of_the_family_or_the_one_asked_for(name: str):
    def built(**options) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return create_model(name, **options).state_dict()

    own, scaled, he = built(), built(init="scaled:0.5"), built(init="he")
    for key, value in own.items():
        is_weight = value.ndim > 1
        assert torch.equal(scaled[key], 0.5 * value if is_weight else value), key
        assert not is_weight or not torch.equal(he[key], value), key
    # the classifier, and every layer of an MLP: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with zero bias
    fc = own["fc.weight"]
    assert fc.abs().max() <= fc.shape[1] ** -0.5
    assert fc.abs().max() > 0.9 * fc.shape[1] ** -0.5
    assert torch.equal(own["fc.bias"], torch.zeros(len(fc)))
    for key, w in own.items():
        if w.ndim == 4:  # He-normal over fan-out
            assert abs(w.square().mean() * w.shape[0] * w[0, 0].numel() / 2 - 1) < 4 * (2 / w.numel()) ** 0.5, key


def test_images_of_another_size_are_one_clear_error_of_an_mlp():
    model = create_model("mlp4x24")
    with pytest.raises(
        ValueError, match=r"takes 144 values an image \(1 x 12 x 12\), got inputs of shape \[2, 1, 28, 28\]"
    ):
        model(torch.randn(2, 1, 28, 28))
    assert create_model("mlp4x24", input_size=(1, 28, 28))(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert model(torch.randn(2, 144)).shape == (2, 10)
