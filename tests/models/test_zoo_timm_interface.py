"""The zoo's networks behave as timm's users expect: features, heads, checkpointing, parameter groups."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from condzoo.models import create_model
from condzoo.models.registry import FAMILIES

MAPS = ["cifar_resnet8_lastbn", "cifar_preresnet8_lastbn", "cifar_preresnet8_nofinalbn", "cifar_vgg8_nobn"]
MAPS += ["cifar_vgg16", "resnet18_lastbn", "preresnet18", "preresnet50_lastbn"]
MLPS = ["mlp4x24", "mlp4x24_bn", "mlp4x24_lastbn"]
SHARED = {name: family.shared for family in FAMILIES.values() for name in family.rows}


def images(name: str, batch: int = 2) -> Tensor:
    """Random images: 12 x 12 grey ones for the small MLPs, 64 x 64 for ImageNet's, 32 x 32 for CIFAR's."""
    shape = (
        (1, 12, 12) if name.startswith("mlp") else (3, 64, 64) if SHARED[name]["dataset"] == "imagenet" else (3, 32, 32)
    )
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("init", ["he", "scaled:0.5", None])
def test_what_timm_saves_for_the_hub_is_loaded_whatever_initialized_it(init: str | None, tmp_path: Path):
    """Of what the network was built with timm writes all into config.json, and hands it back."""
    model = create_model("cifar_resnet8", init=init, num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    x = images("cifar_resnet8")
    for create in (timm.create_model, create_model):
        again = create(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(again(x), model(x))
        with pytest.raises(ValueError, match="init='zero' is for new weights"):
            create(f"local-dir:{tmp_path}", pretrained=True, init="zero")


@pytest.mark.parametrize("name", MAPS + MLPS)
@torch.no_grad()
def test_features_and_head_are_the_forward_pass(name: str):
    model = timm.create_model(name).eval()
    x = images(name)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(hidden), model(x))
    if name in MAPS:
        assert features.shape[:2] == (2, model.num_features)


@pytest.mark.parametrize("name", MAPS + MLPS)
@torch.no_grad()
def test_reset_classifier(name: str):
    model = timm.create_model(name).train()
    last_bn, x = getattr(model, "last_bn", None), images(name)
    assert model.get_classifier() is model.fc is model.get_submodule(model.get_classifier(name_only=True))
    assert model.pretrained_cfg["classifier"] == model.get_classifier(name_only=True)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert all(m.training for m in model.modules())
    assert model.eval()(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert getattr(model, "last_bn", None) is last_bn


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
@pytest.mark.parametrize("name", [name for name in MAPS if name not in ("cifar_vgg16", "preresnet50_lastbn")])
@torch.no_grad()
def test_global_pool(name: str, pool: str):
    x = images(name)
    model = timm.create_model(name, num_classes=0, global_pool=pool).eval()
    features = model.forward_features(x)
    if not pool:
        assert torch.equal(model(x), features)
        return
    mean, top = features.mean((2, 3)), features.amax((2, 3))
    expected = {"avg": mean, "max": top, "avgmax": (mean + top) / 2, "catavgmax": torch.cat([mean, top], 1)}[pool]
    if hasattr(model, "last_bn"):
        expected = expected / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    model.reset_classifier(5, pool)
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_features_only(name: str):
    x = images(name)
    model = timm.create_model(name, features_only=True).eval()
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [x.shape[-1] // m.shape[-1] for m in maps] == model.feature_info.reduction()
    assert len(maps) == SHARED[name]["feature_levels"]
    assert all(m.isfinite().all() for m in maps)
    chosen = timm.create_model(name, features_only=True, out_indices=(0, -1)).eval()
    assert [m.shape for m in chosen(x)] == [maps[0].shape, maps[-1].shape]
    assert create_model(name, features_only=True).feature_info.channels() == model.feature_info.channels()


@pytest.mark.parametrize("name", MLPS)
@torch.no_grad()
def test_features_of_an_mlp_are_its_hidden_layers(name: str):
    model = timm.create_model(name, features_only=True).eval()
    assert [h.shape for h in model(images(name))] == [(2, 24)] * 3
    assert model.feature_info.channels() == [24] * 3


@pytest.mark.parametrize("name", [*MAPS, *MLPS])
def test_grad_checkpointing_gives_the_same_gradients(name: str):
    x = images(name, batch=4)
    gradients, modes = [], (False, True)
    for enable in modes:
        torch.manual_seed(0)
        model = timm.create_model(name).train()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-5)


def test_grad_checkpointing_does_run_the_blocks_again():
    model = timm.create_model("cifar_resnet8").train()
    calls = []
    model.layer2[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(images("cifar_resnet8")).sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", MAPS + MLPS)
def test_group_matcher_orders_every_parameter_from_stem_to_head(name: str, coarse: bool):
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    names = [key for key, _ in model.named_parameters()]
    assert set(groups) == set(names)
    first, last = min(groups.values()), max(groups.values())
    body = [key for key in names if not key.startswith(("last_bn.", "fc."))]
    assert groups[names[0]] == first
    assert groups["fc.weight"] == groups["fc.bias"] == last
    assert [groups[key] for key in body] == sorted(groups[key] for key in body)
    blocks = len({groups[key] for key in body})
    assert blocks > (2 if coarse else 3) or name.startswith("mlp")


@pytest.mark.parametrize("name", ["cifar_resnet8_lastbn", "preresnet18", "mlp4x24_lastbn"])
def test_timm_s_optimizer_groups_hold_every_parameter_once(name: str):
    model = timm.create_model(name)
    decayed = param_groups_layer_decay(model, weight_decay=1e-4, layer_decay=0.5)
    assert sum(len(group["params"]) for group in decayed) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in decayed for p in group["params"]}
    assert scale[id(next(model.parameters()))] < scale[id(model.fc.weight)] == 1.0
    without, with_decay = param_groups_weight_decay(model, weight_decay=1e-4)
    assert without["weight_decay"] == 0.0
    assert all(p.ndim <= 1 for p in without["params"])
    assert all(p.ndim > 1 for p in with_decay["params"])


@pytest.mark.parametrize("name", MAPS + MLPS)
def test_the_input_description_fits_the_network(name: str):
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    assert config["input_size"] == tuple(
        FAMILIES[config_family(name)].rows[name].get("input_size", SHARED[name]["input_size"])
    )
    assert len(config["mean"]) == len(config["std"]) == config["input_size"][0]
    assert all(0 < m < 1 and 0 < s < 1 for m, s in zip(config["mean"], config["std"], strict=True))
    assert config["crop_pct"] <= 1


@pytest.mark.parametrize("name", ["mlp4x24_bn", "mlp3x10"])
@pytest.mark.parametrize("options", [{"input_size": (3, 20, 24)}, {"input_size": [1, 20, 24], "in_chans": 3}])
@torch.no_grad()
def test_the_input_description_of_an_mlp_for_other_images(name: str, options: dict):
    model = create_model(name, **options).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 20, 24)
    assert model(torch.zeros(2, *config["input_size"])).shape == (2, 10)
    assert timm.data.resolve_model_data_config(create_model(name))["input_size"] != (3, 20, 24)


def config_family(name: str) -> str:
    """The table a model stands in."""
    return next(family.name for family in FAMILIES.values() if name in family.rows)


@pytest.mark.parametrize(("name", "layer"), [("cifar_vgg16", "group3"), ("cifar_vgg16_lastbn", "group5")])
def test_groups_of_vgg16_can_be_frozen_one_by_one(name: str, layer: str):
    model = timm.create_model(name)
    groups = [model.get_submodule(f"group{i}") for i in range(1, 6)]
    assert [sum(isinstance(m, nn.Conv2d) for m in g.modules()) for g in groups] == [3] * 5
    frozen = model.get_submodule(layer).requires_grad_(False)
    model.train()(images(name)).sum().backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MAPS + MLPS)
@torch.no_grad()
def test_intermediates_are_the_stages_outputs(name: str):
    """As hooks see them, and as timm's hook-based features have them."""
    model, x = timm.create_model(name).eval(), images(name)
    final, found = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    outputs = []
    modules = [info["module"] for info in model.feature_info][-len(found) :]
    for module in modules:
        model.get_submodule(module).register_forward_hook(lambda _m, _x, h: outputs.append(h.clone()))
    final, found = model.forward_intermediates(x, len(modules))
    assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
    last = len(model.feature_info) - 1
    outputs.clear()
    only = model.forward_intermediates(x, [last - 1, -1], intermediates_only=True)
    assert [h.shape for h in only] == [h.shape for h in found[-2:]]
    outputs.clear()
    stopped, [one] = model.forward_intermediates(x, [last - 1], stop_early=True)
    assert torch.equal(stopped, one)
    assert len(outputs) == len(modules) - 1  # the last stage did not run


@pytest.mark.parametrize("name", MAPS + MLPS)
@torch.no_grad()
def test_features_by_getter_are_those_of_hooks(name: str):
    """A pruned network: without head, and without the stages after the last one asked for."""
    x = images(name)
    for indices in ((0, -1), (0, 1)):
        nets = []
        for kind in ("hook", "getter"):
            torch.manual_seed(0)
            nets.append(timm.create_model(name, features_only=True, out_indices=indices, feature_cls=kind).eval())
        maps = [net(x) for net in nets]
        assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
        assert nets[0].feature_info.channels() == nets[1].feature_info.channels() == [h.shape[1] for h in maps[1]]
        assert not any("last_bn" in key or key.startswith("fc.") for key in nets[1].model.state_dict())
    pruned = timm.create_model(name).eval()
    assert pruned.prune_intermediate_layers([0]) == [0]
    assert pruned(x).shape[1] == pruned.num_features == pruned.feature_info[0]["num_chs"]


def test_intermediates_of_a_preresnet_are_normalized_if_asked():
    model, x = timm.create_model("cifar_preresnet8").eval(), images("cifar_preresnet8")
    plain, normed = (model.forward_intermediates(x, norm=norm, intermediates_only=True) for norm in (False, True))
    assert torch.equal(plain[0], normed[0])
    assert torch.equal(model.relu(model.norm(plain[-1])), normed[-1])
    assert not torch.equal(plain[-1], normed[-1])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(AssertionError, match="feature index 3 is out of range"):
        model.forward_intermediates(x, [3])
