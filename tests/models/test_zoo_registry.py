"""The zoo in timm's registry: every name of the contract, nothing of timm's touched, sizes as published."""

import json
import time

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import condzoo
from condzoo.models import create_model
from condzoo.models.registry import FAMILIES
from tests.forked import forks, run_anew

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110, 230, 1202)
MLP_SIZES = ("4x24", "4x36", "5x256", "8x24", "20x256", "100x256")
NAMES = {  # the contract's table of models, spelled out independently of the zoo's own tables
    *(f"cifar_resnet{d}{s}" for d in CIFAR_DEPTHS for s in ("", "_nobn", "_lastbn", "_nobn_lastbn")),
    *(f"cifar_preresnet{d}{s}" for d in CIFAR_DEPTHS for s in ("", "_nofinalbn", "_lastbn")),
    *(f"cifar_vgg{d}{s}" for d in CIFAR_DEPTHS for s in ("", "_nobn", "_lastbn", "_nobn_lastbn")),
    *("cifar_vgg16", "cifar_vgg16_lastbn"),
    *(f"resnet{d}_lastbn" for d in (18, 34, 50, 101, 152)),
    *(f"preresnet{d}{s}" for d in (18, 50) for s in ("", "_lastbn")),
    *(f"mlp{size}{s}" for size in MLP_SIZES for s in ("", "_bn", "_lastbn")),
}
ROWS = {name: row for family in FAMILIES.values() for name, row in family.rows.items()}
TOO_DEEP_TO_RUN = ("110", "230", "1202")  # their sizes follow from depths 8 and 14
BUILT_1202 = ("cifar_resnet1202_lastbn", "cifar_preresnet1202_nofinalbn")

# He et al. 2015 and torchvision, as DESIGN.md has them; timm counts the same
PUBLISHED = {
    "cifar_resnet20": 269_722,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    "cifar_resnet1202": 19_421_274,
    "cifar_resnet20_lastbn": 269_722 + 128,
    "cifar_resnet1202_lastbn": 19_421_274 + 128,
    "resnet18_lastbn": 11_689_512 + 2 * 512,
    "resnet34_lastbn": 21_797_672 + 2 * 512,
    "resnet50_lastbn": 25_557_032 + 2 * 2048,
    "resnet101_lastbn": 44_549_160 + 2 * 2048,
    "resnet152_lastbn": 60_192_808 + 2 * 2048,
    "mlp8x24": 7_330,
}

REGISTRIES = """
import json
import timm
from timm.models import _registry as registry

def registries():
    found = {}
    tables = ("entrypoints", "default_cfgs", "pretrained_cfgs", "to_module")
    for name in (*(f"_model_{t}" for t in tables), "_deprecated_models"):
        table = getattr(registry, name, {})
        found[name] = {key: repr(table[key]) if not callable(table[key]) else table[key].__module__ for key in table}
    found["lists"] = {m: ",".join(sorted(registry._module_to_models[m])) for m in registry._module_to_models}
    found["tags"] = {m: ",".join(registry._model_with_tags[m]) for m in registry._model_with_tags}
    return found

print(json.dumps(registries()))
import condzoo.models
print(json.dumps(registries()))
"""


def test_the_names_are_those_of_the_contract():
    assert set(ROWS) == NAMES
    assert sorted(condzoo.list_models()) == sorted(NAMES)
    assert set(timm.list_models()) >= NAMES


@forks
def test_importing_the_zoo_adds_its_names_and_changes_nothing_else_in_timm(tmp_path):
    before, after = map(json.loads, run_anew(REGISTRIES, tmp_path, ("condzoo", "timm")).splitlines())
    for table, rows in before.items():
        assert rows.items() <= after[table].items(), table
    added = set(after["_model_entrypoints"]) - set(before["_model_entrypoints"])
    assert added == NAMES
    assert {after["_model_entrypoints"][name].rpartition(".")[0] for name in added} == {"condzoo.models"}
    assert set(after["lists"]) - set(before["lists"]) == {
        "cifar_preresnet", "cifar_resnet", "cifar_vgg", "imagenet_resnet", "mlp"
    }  # fmt: skip


def test_a_name_of_timm_s_is_delegated():
    torch.manual_seed(0)
    ours = condzoo.create_model("test_resnet", num_classes=3)
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=3)
    assert type(ours) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", sorted(n for n in NAMES if not any(d in n for d in TOO_DEEP_TO_RUN)))
def test_size_of_every_model(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    info, row = condzoo.model_info(name), ROWS[name]
    params = sum(p.numel() for p in model.parameters())
    assert params == row["params"] == info.params == PUBLISHED.get(name, params)
    assert hasattr(model, "last_bn") == name.endswith("_lastbn") == row["last_bn"]
    norms = [
        m for key, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and key != "last_bn"
    ]
    assert bool(norms) == (row["norm"] == "bn")
    assert count_macs(model, info.input_size) == row["macs"] == info.macs


@pytest.mark.parametrize("name", sorted(n for n in NAMES if ROWS[n]["depth"] <= 20))
def test_condzoo_and_timm_build_the_same_shapes(name: str):
    with torch.device("meta"):
        ours, theirs = condzoo.create_model(name).state_dict(), timm.create_model(name).state_dict()
    assert list(ours) == list(theirs)
    assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]


@pytest.mark.parametrize("name", BUILT_1202)
def test_1202_layers_build_in_five_seconds(name: str):
    for device in ("cpu", "meta"):
        start = time.process_time()  # not the clock on the wall: the suite may share the machine
        with torch.device(device):
            model = create_model(name)
        assert time.process_time() - start < 5
        assert (
            sum(p.numel() for p in model.parameters())
            == ROWS[name]["params"]
            == PUBLISHED.get(name, ROWS[name]["params"])
        )


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-adds of one image: an output entry takes fan_in of them. On the meta device."""
    total = 0

    def add(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        nonlocal total
        total += out.numel() * (module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return total


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize("name", sorted(n for n in NAMES if any(d in n for d in TOO_DEEP_TO_RUN)))
def test_sizes_grow_by_the_same_with_every_block(name: str, what: str):
    depth = next(d for d in TOO_DEEP_TO_RUN if d in name)
    eight, fourteen, own = (getattr(condzoo.model_info(name.replace(depth, d)), what) for d in ("8", "14", depth))
    assert own == eight + (int(depth) - 8) // 6 * (fourteen - eight)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16", "resnet50_lastbn", "preresnet18", "mlp8x24"])
def test_multiply_adds_agree_with_pytorch_s_own_counter(name: str):
    with torch.device("meta"):
        model = create_model(name).eval()
    info = condzoo.model_info(name)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *info.input_size, device="meta"))
    assert counter.get_total_flops() == 2 * info.macs


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet8_lastbn",
        "cifar_resnet14_nobn",
        "cifar_preresnet8_nofinalbn",
        "cifar_vgg14_nobn_lastbn",
        "mlp4x24_bn",
        "mlp5x256_lastbn",
        "resnet18_lastbn",
        "preresnet18",
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 3, "in_chans": 2, "last_bn_init": "uniform"}, {"init": "orthogonal"}]
)
def test_condzoo_and_timm_build_equal_values_under_one_seed(name: str, options: dict):
    if not name.endswith("_lastbn"):
        options = {key: value for key, value in options.items() if key != "last_bn_init"}
    if "resnet18" in name and "init" in options:
        pytest.skip("orthogonalization of 11 M weights takes seconds")
    torch.manual_seed(5)
    ours = condzoo.create_model(name, **options).state_dict()
    torch.manual_seed(5)
    theirs = timm.create_model(name, **options).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    torch.manual_seed(6)
    other = condzoo.create_model(name, **options).state_dict()
    assert not torch.equal(other["fc.weight"], ours["fc.weight"])


@pytest.mark.parametrize(("name", "layers"), [("mlp12x64_bn", 12), ("mlp3x5", 3), ("mlp7x10_lastbn", 7)])
def test_any_other_mlp_is_built_by_its_name(name: str, layers: int):
    model = create_model(name, num_classes=3)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == layers
    assert linears[0].in_features == 784
    assert {m.out_features for m in linears[:-1]} == {int(name.split("x")[1].split("_")[0])}
    assert hasattr(model, "last_bn") == name.endswith("_lastbn")
    assert any(isinstance(m, nn.BatchNorm1d) for m in linears and model.layers.modules()) == name.endswith("_bn")
    assert model(torch.randn(4, 1, 28, 28)).shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("resnet50_lastbm", {}, r"unknown model 'resnet50_lastbm'; did you mean 'resnet50_lastbn'"),
        ("cifar_resnet20_lastnb", {}, r"did you mean 'cifar_resnet20_lastbn'"),
        ("CIFAR_ResNet20_LastBN", {}, r"did you mean 'cifar_resnet20_lastbn'"),
        ("no such thing at all", {}, r"unknown model 'no such thing at all'; condzoo.list_models\(\) lists them all"),
        ("mlp99999x9", {}, r"'mlp99999x9': at most 10,000 layers, of 1,000,000 units, are built by name"),
        ("mlp2x1000001", {}, r"'mlp2x1000001': at most 10,000 layers, of 1,000,000 units, are built by name"),
        ("mlp2x" + "9" * 5000, {}, r"^'mlp2x9{52}\.\.\.': at most 10,000 layers, of 1,000,000 units, are built"),
        ("cifar_resnet57", {}, r"depth must be 6n \+ 2, got 57; nearest are 56 and 62"),
        ("cifar_preresnet9_lastbn", {}, r"depth must be 6n \+ 2, got 9; nearest are 8 and 14"),
        ("cifar_vgg4", {}, r"depth must be 6n \+ 2, got 4; the smallest is 8"),
        ("resnet51_lastbn", {}, r"depth must be one of 18, 34, 50, 101, 152, got 51; nearest is 50"),
        ("preresnet34", {}, r"depth must be one of 18, 50, got 34; nearest is"),
        ("mlp1x24", {}, r"layers counts linear layers, the classifier included, and must be at least 2, got 1"),
        ("mlp4x0", {}, r"width must be at least 1, got 0"),
        ("cifar_resnet8", {"init": "hee"}, r"unknown init 'hee'; did you mean 'he'\?"),
        ("mlp4x24", {"init": "scaled:1,2"}, r"factors must be one for all or one a layer \(4\), got 2"),
        ("test_resnet", {"init": "orthogonl"}, r"unknown init 'orthogonl'; did you mean 'orthogonal'\?"),
        ("cifar_resnet8_lastbn", {"last_bn_init": "one"}, r"unknown last_bn_init 'one'; did you mean 'ones'\?"),
        (
            "cifar_resnet8",
            {"last_bn_init": "uniform"},
            r"last_bn_init='uniform' needs a last BN, .* take its _lastbn twin",
        ),
        ("cifar_resnet8", {"in_chans": 0}, r"in_chans must be an integer of at least 1, got 0"),
        ("resnet18", {"in_chans": 0}, r"in_chans must be an integer of at least 1, got 0"),
        ("resnet18_lastbn", {"num_classes": -1}, r"num_classes must be an integer of at least 0 .*, got -1"),
        ("mlp4x24", {"num_classes": -3}, r"num_classes must be an integer of at least 0 .*, got -3"),
        ("mlp4x24", {"global_pool": "avg"}, r"an MLP has nothing to pool, got global_pool='avg'"),
        ("mlp4x24", {"input_size": (12, 12)}, r"input_size must be \(channels, height, width\), .* got \(12, 12\)"),
        ("mlp4x24", {"input_size": 12}, r"input_size must be .* an integer of at least 1, got 12"),
        ("mlp4x24", {"input_size": (1, 12.0, 12)}, r"input_size must be .* got \(1, 12\.0, 12\)"),
        ("mlp3x10", {"input_size": (1, 0, 12)}, r"input_size must be .* got \(1, 0, 12\)"),
        (
            "mlp8x24.mnist",
            {"pretrained": True, "init": "he"},
            r"init='he' is for new weights, and",
        ),
        ("test_resnet", {"pretrained": True, "init": "he"}, r"pretrained=True loads trained ones; leave one out"),
        ("mlp3x10", {"checkpoint_path": "w.pth", "init": "he"}, r"checkpoint_path loads trained ones; leave one out"),
    ],
)
def test_errors_name_what_came_and_what_is_allowed(name: str, options: dict, text: str):
    with pytest.raises(ValueError, match=text):
        condzoo.create_model(name, **options)


def test_timm_too_refuses_an_initializer_beside_trained_weights():
    with pytest.raises(ValueError, match="init='he' is for new weights, and pretrained=True loads trained ones"):
        timm.create_model("mlp8x24", pretrained=True, init="he")


@forks
def test_a_name_that_timm_has_one_day_is_left_to_timm(tmp_path):
    code = """
import timm, torch
from timm.models import register_model
@register_model
def preresnet18(pretrained=False, **kwargs):
    return torch.nn.Linear(1, 1)
import condzoo.models
assert type(condzoo.create_model("preresnet18")) is torch.nn.Linear
assert type(timm.create_model("preresnet18")) is torch.nn.Linear
assert condzoo.create_model("preresnet18_lastbn").last_bn.num_features == 512
"""
    run_anew(code, tmp_path, ("condzoo", "timm"))


def test_other_sizes_take_what_timm_s_factory_takes(tmp_path):
    first = create_model("mlp3x12_bn")
    path = tmp_path / "weights.safetensors"
    save_file(first.state_dict(), path)
    again = create_model("mlp3x12_bn", checkpoint_path=str(path), scriptable=False, num_classes=np.int64(10))
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    config = {**first.pretrained_cfg, "crop_pct": 0.5}
    assert create_model("mlp3x12_bn", pretrained_cfg=config).pretrained_cfg["crop_pct"] == 0.5
