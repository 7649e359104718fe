"""fp16's loss scaler, tried on the CPU: a step that it skips is not divergence, a loss that is not finite is."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from condzoo.training import preparation, train
from condzoo.training.divergence import NonFinite
from condzoo.training.precision import Numerics
from condzoo.training.preparation import Training, prepare, training_steps
from condzoo.training.steps import take_step

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["immediate", "deferred"])
def checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "checks_are_deferred", lambda device: request.param)


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision where a recipe may not ask for it, with a first scale that a few steps have to lower."""
    monkeypatch.setattr(preparation, "resolve_numerics", lambda recipe, model, device: Numerics("fp16", False, device))
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def scaled(recipe: Any, scale: float) -> Training:
    """A training in float32 with a loss scaler."""
    return replace(prepare(recipe, CPU), scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moved(model: nn.Module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_an_overflow_skips_the_step_and_halves_the_scale(optim: str, tiny: Any) -> None:
    section = {"name": "sgd", "lr": 0.1, "momentum": 0.9} if optim == "sgd" else {"name": "adamw", "lr": 0.01}
    training = scaled(tiny(optim=section, grad_clip=1.0, ema=0.5), 2.0**10)
    first = training.model.get_parameter("layers.1.linear.weight")
    steps = training_steps(training, 0, 4)
    take_step(training, next(steps))
    before = weights(training.model)
    handle = first.register_hook(lambda gradient: gradient * torch.inf)
    for _ in range(2):
        take_step(training, next(steps))
    training.guard.check()
    assert not moved(training.model, before)
    assert training.scaler.get_scale() == 2.0**8
    handle.remove()
    take_step(training, next(steps))
    training.guard.check()
    assert moved(training.model, before)
    assert all(bool(p.isfinite().all()) for p in training.result.parameters())


def spoil_loss(fc: Any, x: Any) -> Any:
    return (x[0] * torch.inf,)


def spoil_statistics(norm: Any, x: Any) -> None:
    norm.running_var.data.fill_(torch.inf)  # as BatchNorm does, past autograd


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(("place", "spoil"), [("fc", spoil_loss), ("layers.1.bn", spoil_statistics)])
def test_a_loss_or_statistic_that_is_not_finite_is_divergence_with_a_scaler_too(
    place: str, spoil: Any, tiny: Any
) -> None:
    training = scaled(tiny(**{"model.name": "mlp4x24_bn"}), 2.0**10)
    steps = training_steps(training, 0, 3)
    take_step(training, next(steps))
    before = weights(training.model)
    handle = training.model.get_submodule(place).register_forward_pre_hook(spoil)
    with pytest.raises(NonFinite, match="of step 1 is not finite"):  # noqa: PT012
        take_step(training, next(steps))
        handle.remove()
        take_step(training, next(steps))
        training.guard.check()
    assert not moved(training.model, before)


@pytest.mark.usefixtures("checks", "fp16")
def test_a_run_in_fp16_skips_steps_and_goes_on_bitwise(tiny: Any, tmp_path: Path) -> None:
    recipe = tiny()
    whole = train(recipe, out=tmp_path / "whole", device="cpu")
    assert (whole.summary["status"], whole.summary["precision"]) == ("done", "fp16")
    newest = max((whole.path / "checkpoints").glob("*.json"))
    assert json.loads(newest.read_text())["numbers"]["scaler"]["scale"] < 2.0**24
    for steps in (2, 7, None):
        train(recipe, out=tmp_path / "pieces", max_steps=steps, device="cpu")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    assert all(torch.equal(first[key], second[key]) for key in first)
