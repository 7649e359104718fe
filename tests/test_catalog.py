"""The catalogue answers from the tables, without torch, and says what create_model builds."""

import dataclasses
import re

import pytest
import timm

from condzoo.catalog import list_models, model_info
from condzoo.models import released
from tests.forked import forks, run_anew


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet56", 853_018),
        ("cifar_resnet110", 1_727_962),
        ("cifar_resnet1202", 19_421_274),
        ("cifar_resnet20_lastbn", 269_722 + 128),
        ("mlp8x24", 7_330),
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
    ],
)
def test_recorded_sizes_are_the_published_ones(name, params):
    assert model_info(name).params == params


def test_filters_are_wildcards_and_families():
    assert list_models("resnet??_lastbn") == ["resnet18_lastbn", "resnet34_lastbn", "resnet50_lastbn"]
    assert list_models("cifar_resnet20") == ["cifar_resnet20"]
    assert list_models(["resnet18_*", "cifar_resnet20"]) == ["cifar_resnet20", "resnet18_lastbn"]
    assert list_models([]) == list_models("") == list_models()
    assert len(list_models(family="mlp")) == 18
    assert list_models("*resnet*", family="mlp") == []
    with pytest.raises(ValueError, match="unknown family 'mlps'; one of: cifar_preresnet, cifar_resnet"):
        list_models(family="mlps")


def test_info_of_a_model_without_a_row_is_counted():
    info = model_info("mlp12x64_bn")
    weights = 784 * 64 + 10 * 64 * 64 + 64 * 10
    assert (info.family, info.depth, info.norm, info.last_bn) == ("mlp", 12, "bn", False)
    assert info.macs == weights
    assert info.params == weights + 10 + 11 * 2 * 64
    assert model_info("cifar_resnet62_lastbn").params == 269_722 + 128 + 7 * 2 * 9 * (16**2 + 32**2 + 64**2) + (
        7 * 2 * 2 * (16 + 32 + 64)
    )
    cait = model_info("cait_xxs24_224")  # of whose class token gradient hooks find no function
    assert (round(cait.params / 1e6, 1), round(cait.macs / 1e9, 1)) == (12.0, 2.5)  # of arXiv:2103.17239, table 6


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(ValueError, match=re.escape("unknown model 'resnet50_lastbm'; did you mean 'resnet50_lastbn'?")):
        model_info("resnet50_lastbm")


def test_a_tag_that_there_is_not_is_an_error_for_any_name():
    assert model_info("resnet50.a1_in1k").params == model_info("resnet50").params
    with pytest.raises(ValueError, match=r"timm has no weights 'resnet50\.nonsense'; did you mean"):
        model_info("resnet50.nonsense")
    with pytest.raises(ValueError, match="no weights are released for 'mlp12x64': it is not one of the registered"):
        model_info("mlp12x64.authors")


def test_info_of_a_tag_is_of_the_network_that_it_builds(tmp_path, monkeypatch):
    info = model_info("vit_tiny_patch16_224.augreg_in21k")
    assert (info.name, info.num_classes, info.params) == ("vit_tiny_patch16_224", 21_843, 9_740_115)
    plain = model_info("cifar_resnet8")
    (tmp_path / "index.toml").write_text('["cifar_resnet8.mine"]\nsha256 = "0"\nnum_classes = 100\n')
    monkeypatch.setattr(released, "INDEX", tmp_path / "index.toml")
    config = dataclasses.replace(timm.get_pretrained_cfg("cifar_resnet8"), num_classes=100)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, "cifar_resnet8.mine", config)
    info = model_info("cifar_resnet8.mine")
    assert info == dataclasses.replace(plain, num_classes=100, params=info.params, macs=info.macs)
    built = timm.create_model("cifar_resnet8.mine")
    assert (info.params, info.macs) == (sum(p.numel() for p in built.parameters()), plain.macs + 64 * 90)


@forks
def test_asking_for_a_model_registers_all_with_timm(tmp_path):
    code = "import condzoo, timm; condzoo.model_info('cifar_resnet20'); timm.create_model('cifar_resnet20')"
    run_anew(code, tmp_path, ("condzoo", "timm"))
