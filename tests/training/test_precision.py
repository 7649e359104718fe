"""What precision and channels_last mean where the tests run, and what `auto` picks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from condzoo.models import create_model
from condzoo.training import Notice, evaluate_run, precision, train
from condzoo.training.precision import has_bf16_units, resolve_device, resolve_numerics
from condzoo.training.resume import newest_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "units", "channels_last", "expected"),
    [
        ("cifar_resnet8", True, "auto", ("bf16", True)),
        ("cifar_resnet8", True, False, ("fp32", False)),  # bf16 without channels_last is slower than fp32
        ("cifar_resnet8", False, "auto", ("fp32", True)),
        ("mlp4x24", True, "auto", ("fp32", False)),
    ],
)
def test_auto_picks_bf16_for_convolutions_with_units_for_it(
    model: str, units: bool, channels_last: Any, expected: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda device: units)
    with torch.device("meta"):
        network = create_model(model)
    numerics = resolve_numerics(tiny(channels_last=channels_last), network, CPU)
    assert (numerics.precision, numerics.channels_last) == expected


def test_units_are_read_from_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ((), ("_is_amx_tile_supported",), ("_is_avx512_bf16_supported",)):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name, names=names: name in names, raising=False)
        assert has_bf16_units(CPU) == bool(names)


def test_units_are_those_of_the_gpu_that_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says them of the current one, which `--device cuda:1` does not make it."""
    current = [0]

    @contextmanager
    def set_to(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", set_to)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 1)
    assert has_bf16_units(torch.device("cuda", 1))
    assert not has_bf16_units(torch.device("cuda", 0))


def test_fp16_needs_a_gpu(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision: fp16 needs a GPU; on a CPU use bf16, fp32 or auto"):
        train(tiny(precision="fp16"), out=tmp_path / "run", device="cpu")


def test_an_absent_device_is_said() -> None:
    with pytest.raises(ValueError, match=r"device 'cud' cannot be used here: .*; try --device cpu"):
        resolve_device("cud")
    with pytest.raises(ValueError, match=r"device 'meta' cannot be used here: it must be of cpu, cuda; try --device"):
        resolve_device("meta")
    for name in ("mps", "mps:0"):
        with pytest.raises(ValueError, match=rf"^device '{name}': sums are in float64, which MPS does not have; use"):
            resolve_device(name)
    with pytest.raises(ValueError, match=r"device 'hpu' cannot be used here: .*; try --device cpu"):  # a package
        resolve_device("hpu")
    assert resolve_device("cpu") == CPU


def test_bf16_trains_with_float32_weights_and_evaluates_the_same_again(tiny: Any, tmp_path: Path) -> None:
    changes = {"model.name": "cifar_resnet8_lastbn", "precision": "bf16"}
    run = train(tiny(**changes), out=tmp_path / "bf16", device="cpu", max_steps=4)
    full = train(tiny(**{**changes, "precision": "fp32"}), out=tmp_path / "fp32", device="cpu", max_steps=4)
    assert run.summary["precision"] == "bf16"
    weights, others = run.load_model().state_dict(), full.load_model().state_dict()
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights.values())
    gap = max(float((weights[k] - others[k]).abs().max()) for k in weights if "conv" in k)
    assert 0 < gap < 0.1
    assert evaluate_run(run.path, device="cpu").correct == run.summary["test_correct"]


@pytest.mark.parametrize("outer", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("own", ["fp32", "bf16"])
def test_a_callers_autocast_changes_nothing(own: str, outer: bool, tiny: Any, tmp_path: Path) -> None:
    """Neither the recipe's precision nor, where a bf16 run would go on with weights cast once, the steps."""
    recipe = tiny(precision=own, ema=0.9, epochs=1)
    plain = train(recipe, out=tmp_path / "plain", device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        inside = train(recipe, out=tmp_path / "inside", device="cpu")
        again = evaluate_run(inside.path, device="cpu")
        assert torch.is_autocast_enabled("cpu") == outer
        assert torch.is_autocast_cache_enabled()
    assert plain.summary["precision"] == inside.summary["precision"] == own
    names = ("train_loss", "test_loss", "test_correct")
    assert [inside.summary[name] for name in names] == [plain.summary[name] for name in names]
    assert again.loss == inside.summary["test_loss"]


@pytest.mark.parametrize("units", [False, True], ids=["fp32", "bf16"])
def test_a_run_is_evaluated_in_its_own_precision_where_auto_is_another(
    units: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_units", lambda device: units)
    run = train(tiny(**{"model.name": "cifar_resnet8"}), out=tmp_path, device="cpu", max_steps=2)
    monkeypatch.setattr(precision, "has_bf16_units", lambda device: not units)
    assert evaluate_run(run.path, device="cpu").loss == run.summary["test_loss"]


def test_a_run_that_goes_on_in_another_precision_says_so(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def notices(units: bool, steps: int) -> list[str]:
        events: list[Any] = []
        monkeypatch.setattr(precision, "has_bf16_units", lambda device: units)
        train(recipe, out=tmp_path, device="cpu", max_steps=steps, on_event=events.append)
        return [event.text for event in events if isinstance(event, Notice)]

    recipe = tiny(**{"model.name": "cifar_resnet8", "eval_every": 0})
    assert notices(units=True, steps=1) == notices(units=True, steps=2) == []
    assert notices(units=False, steps=3) == [
        "the run was trained in bf16 (channels_last) on cpu and goes on in fp32 (channels_last) on cpu: each step "
        "rounds differently"
    ]
    old = newest_checkpoint(tmp_path / "checkpoints", notify=lambda text: None)
    assert old is not None
    assert [old.numbers.pop(name) for name in ("precision", "channels_last", "device")] == ["fp32", True, "cpu"]
    save_checkpoint(tmp_path / "checkpoints", old)
    assert notices(units=True, steps=4) == [], "a checkpoint of an older version does not say it"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="set by operation since 2.9")
def test_float32_is_float32_whatever_a_notebook_has_set() -> None:
    """No GPU here: what cuBLAS, cuDNN and oneDNN are told, and that it is as before after it."""
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    settings += [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        before = [setting.fp32_precision for setting in settings]
        with precision.usual_torch():
            assert all(setting.fp32_precision in ("none", "ieee") for setting in settings)
        assert [setting.fp32_precision for setting in settings] == before
    finally:
        torch.set_float32_matmul_precision(own)


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_older_settings_of_float32_can_be_read_where_a_notebook_has_not_mixed_them(products: str) -> None:
    """torch.compile reads them (in torch 2.9 and 2.10), which from 2.9 on is an error where the newer ones differ."""

    def old() -> tuple[str, bool, bool]:
        own = torch.get_float32_matmul_precision()
        return own, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(products)
        before = old()
        with precision.usual_torch():
            assert old() == ("highest", False, False)
        assert old() == before == (products, products != "highest", True)
    finally:
        torch.set_float32_matmul_precision(own)
