"""timm's own networks: older names, tags, weights that the caller brings, and what `model_info` says of them."""

import re

import pytest
import timm
import torch
from timm.layers import FrozenBatchNormAct2d, RmsNorm2d
from torch import nn

from condzoo.catalog import model_info
from condzoo.models import create_model
from condzoo.models.registry import norm_of
from condzoo.models.timm_models import current_name


@pytest.mark.parametrize(
    ("name", "today"),
    [
        ("tv_resnet50", "resnet50.tv_in1k"),
        ("tf_efficientnet_b0_ns", "tf_efficientnet_b0.ns_jft_in1k"),
        ("tv_resnet50.a1_in1k", "resnet50.a1_in1k"),  # timm takes the tag that is given
        ("resnet50", "resnet50"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("cifar_resnet20", "cifar_resnet20"),
    ],
)
def test_an_older_name_stands_for_what_it_is_today(name, today):
    assert current_name(name) == today


@pytest.mark.parametrize("name", ["tv_resnet50", "vit_tiny_patch16_224_in21k"])
def test_weights_of_an_older_name_are_left_to_timm(name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, **given: (name, given["pretrained"]))
    assert create_model(name, pretrained=True) == (name, True)
    with pytest.raises(ValueError, match=re.escape("timm has no weights 'resnet50.tv_in1kk'; did you mean 'resnet50.")):
        create_model("tv_resnet50.tv_in1kk", pretrained=True)


def test_a_name_that_timm_has_removed_is_said(monkeypatch):
    monkeypatch.setattr("condzoo.models.timm_models.get_deprecated_models", lambda: {"test_vit": None})
    with pytest.raises(ValueError, match="timm has removed 'test_vit' and has no other in its place"):
        create_model("test_vit")


def test_weights_that_the_caller_brings_need_none_of_timms(tmp_path, monkeypatch):
    theirs = timm.create_model("test_resnet")
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    config = {**theirs.pretrained_cfg, "file": str(tmp_path / "w.pth")}
    monkeypatch.setattr(timm, "list_pretrained", lambda *_: [])
    with pytest.raises(ValueError, match="timm has no pretrained weights for 'test_resnet'"):
        create_model("test_resnet", pretrained=True)
    for given in ({"pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}}, {"pretrained_cfg": config}):
        loaded = create_model("test_resnet", pretrained=True, **given).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("test_resnet", "bn"),
        ("test_vit", "ln"),
        ("test_convnext", "ln"),
        ("resnetv2_50x1_bit", "gn"),
        ("poolformer_s12", "gn"),
        ("test_nfnet", "none"),
    ],
)
def test_the_normalization_of_timms_networks_is_named(name, norm):
    assert model_info(name).norm == norm


def test_frozen_batch_norm_and_rms_norm_are_named_and_most_layers_decide():
    assert norm_of(nn.Sequential(FrozenBatchNormAct2d(3))) == "bn"
    assert norm_of(nn.Sequential(nn.RMSNorm(3), nn.BatchNorm1d(3), RmsNorm2d(3))) == "ln"
    model = nn.Module()
    model.last_bn = nn.BatchNorm1d(3)
    assert norm_of(model) == "none"
