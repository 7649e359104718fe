"""insert_last_bn on timm's and torchvision's architectures: the function stays, the head's input is standardized."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.models.densenet import DenseNet
from timm.models.hgnet import HighPerfGpuNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vgg import VGG
from timm.models.volo import VOLO
from torch import Tensor, nn
from torchvision.models import convnext, swin_transformer

from condzoo.models.last_bn_insertion import insert_last_bn

CLASSES = 7


class FlattensLate(nn.Module):
    """Drops out the pooled map and flattens it by a function call, as torchvision's Inception v3 does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.avgpool = nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1)
        self.dropout, self.fc = nn.Dropout(0.1), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.dropout(self.avgpool(self.conv(x).relu())), 1))


# name -> (how to build it, image size)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=CLASSES), 32),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=CLASSES), 32),
    "timm convnext": (lambda: timm.create_model("test_convnext", num_classes=CLASSES, drop_rate=0.1), 32),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=CLASSES, img_size=32, drop_rate=0.1), 32),
    "timm nfnet": (lambda: timm.create_model("test_nfnet", num_classes=CLASSES), 32),
    "timm byobnet": (lambda: timm.create_model("test_byobnet", num_classes=CLASSES), 32),
    "timm mambaout": (lambda: timm.create_model("test_mambaout", num_classes=CLASSES), 32),
    "timm regnet": (lambda: timm.create_model("regnetx_002", num_classes=CLASSES), 32),
    "timm mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=CLASSES), 32),
    "timm efficientvit": (lambda: timm.create_model("efficientvit_b0", num_classes=CLASSES), 32),
    "timm swin": (
        lambda: SwinTransformer(
            32, 2, embed_dim=12, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=CLASSES
        ),
        32,
    ),
    "timm mixer": (
        lambda: MlpMixer(num_classes=CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=16),
        32,
    ),
    "timm densenet": (lambda: DenseNet(8, (2, 2), num_classes=CLASSES), 32),
    "timm vgg": (lambda: VGG([8, "M", 8, "M"], num_classes=CLASSES, mlp_ratio=0.01), 32),
    "timm hgnet": (
        lambda: HighPerfGpuNet(
            {
                "stem_type": "v2",
                "stem_chs": [4, 8],
                "stage1": [8, 8, 16, 1, False, False, 3, 2],
                "stage2": [16, 8, 24, 1, True, True, 3, 2],
                "stage3": [24, 8, 24, 1, True, True, 3, 1],
                "stage4": [24, 8, 24, 1, False, True, 3, 1],
            },
            num_classes=CLASSES,
            head_hidden_size=20,
            drop_rate=0.1,
        ),
        32,
    ),
    "timm volo": (
        lambda: VOLO([1, 1], img_size=64, num_classes=CLASSES, stem_hidden_dim=8, embed_dims=[8, 12], num_heads=[2, 2]),
        64,
    ),
    "flattens late": (FlattensLate, 32),
    "torchvision resnet": (lambda: torchvision.models.resnet18(num_classes=CLASSES), 32),
    "torchvision mobilenetv2": (lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=0.25), 32),
    "torchvision mobilenetv3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES), 32),
    "torchvision shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES), 32),
    "torchvision densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=CLASSES), 32),
    "torchvision regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=CLASSES), 32),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES),
        32,
    ),
    "torchvision swin": (
        lambda: swin_transformer.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=CLASSES),
        32,
    ),
    "torchvision convnext": (
        lambda: convnext.ConvNeXt(
            [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)], num_classes=CLASSES
        ),
        32,
    ),
}


def build(architecture: str) -> tuple[nn.Module, list[Tensor]]:
    """A network in eval mode whose head is not zero, and two batches of unequal size for it."""
    create, size = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = create().eval()
    for p in head_of(model).parameters():
        nn.init.normal_(p, std=0.2)
    return model, [torch.randn(12, 3, size, size), 2 * torch.randn(5, 3, size, size) + 1]


def head_of(model: nn.Module) -> nn.Linear:
    """The classifier: the last linear layer with one output a class, that is no second head."""
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "aux_head"]
    return [m for m in layers if m.out_features == CLASSES][-1]


@torch.no_grad()
def head_inputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """What the classifier sees on every batch, [N, D]: taken after all other hooks."""
    seen: list[Tensor] = []
    handle = head_of(model).register_forward_hook(lambda module, args, out: seen.append(args[0]))
    for x in batches:
        model(x)
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_function_stays_and_the_input_is_standardized(architecture: str):
    plain, batches = build(architecture)
    before = [plain(x) for x in batches]
    assert all(y.std() > 1e-4 for y in before)  # a function that is worth keeping

    identity = insert_last_bn(copy.deepcopy(plain))
    for x, y in zip(batches, before, strict=True):
        torch.testing.assert_close(identity(x), y, rtol=1e-6, atol=1e-6)

    model = copy.deepcopy(plain)
    raw = head_inputs(plain, batches)
    assert insert_last_bn(model, batches) is model
    for x, y in zip(batches, before, strict=True):
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    h = head_inputs(model, batches)
    variance = raw.var(0, correction=0)
    torch.testing.assert_close(h.mean(0), torch.zeros_like(variance), rtol=0, atol=1e-3)
    torch.testing.assert_close(h.var(0, correction=0), variance / (variance + 1e-5), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.last_bn.running_mean.double(), raw.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.last_bn.weight, torch.ones_like(model.last_bn.weight))
    assert torch.equal(model.last_bn.bias, torch.zeros_like(model.last_bn.bias))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_weights_load_and_round_trip(architecture: str):
    plain, batches = build(architecture)
    x, expected = batches[0], plain(batches[0])
    fresh = insert_last_bn(ARCHITECTURES[architecture][0]().eval())
    assert set(fresh.state_dict()) - set(plain.state_dict()) == {
        f"last_bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(x), expected, rtol=1e-6, atol=1e-6)
    calibrated = insert_last_bn(plain, batches)
    fresh.load_state_dict(calibrated.state_dict())
    assert torch.equal(fresh(x), calibrated(x))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith("timm")])
def test_timm_classifiers_can_be_reset(architecture: str):
    model, batches = build(architecture)
    insert_last_bn(model, batches)
    assert model.get_classifier() is head_of(model) or head_of(model) in model.get_classifier().modules()
    last_bn = model.last_bn
    nn.init.constant_(last_bn.bias, 3.0)
    model.reset_classifier(CLASSES)
    assert model.last_bn is last_bn
    torch.testing.assert_close(
        head_inputs(model, batches).mean(0), torch.full((last_bn.num_features,), 3.0).double(), rtol=0, atol=1e-3
    )
    model.reset_classifier(0)
    with torch.no_grad():
        features = torch.cat([model(x) for x in batches]).double()
    torch.testing.assert_close(features.mean(0), torch.full_like(features[0], 3.0), rtol=0, atol=1e-3)
    model.reset_classifier(CLASSES)
    torch.testing.assert_close(head_inputs(model, batches).mean(0), features.mean(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("architecture", ["timm resnet", "torchvision mobilenetv3"])
@torch.no_grad()
def test_a_copy_has_a_last_bn_of_its_own(architecture: str, clone: Callable):
    model, batches = build(architecture)
    insert_last_bn(model, batches)
    expected = model(batches[0])
    twin = clone(model)
    assert torch.equal(twin(batches[0]), expected)
    twin.last_bn.bias.add_(1)
    assert not torch.allclose(twin(batches[0]), expected)
    assert torch.equal(model(batches[0]), expected)
    if hasattr(twin, "reset_classifier"):
        old = model.get_classifier()
        twin.reset_classifier(3)
        assert twin(batches[0]).shape == (12, 3)
        assert model.get_classifier() is old


def test_the_same_keys_as_the_zoo_s_own_last_bn():
    inserted = insert_last_bn(timm.create_model("resnet18", num_classes=CLASSES))
    import condzoo.models  # noqa: F401

    assert set(inserted.state_dict()) == set(timm.create_model("resnet18_lastbn", num_classes=CLASSES).state_dict())


@torch.no_grad()
def test_a_last_bn_that_takes_the_place_of_another_is_the_one_that_runs():
    """As torch's and timm's conversions to SyncBatchNorm put one there; without a process group it is BatchNorm."""
    plain, batches = build("torchvision resnet")
    expected = insert_last_bn(copy.deepcopy(plain), batches)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(insert_last_bn(plain, batches))
    assert type(model.last_bn) is nn.SyncBatchNorm
    model.eval()
    torch.testing.assert_close(model(batches[0][:1]), expected(batches[0][:1]))
    model.last_bn.bias.fill_(5.0)
    assert (model(batches[0]) - expected(batches[0])).abs().min() > 1e-3
    model.load_state_dict(build("torchvision resnet")[0].state_dict())  # plain weights: it is the identity again
    torch.testing.assert_close(model(batches[0]), build("torchvision resnet")[0](batches[0]), rtol=1e-5, atol=1e-5)
