"""Learning rates against torch's own schedulers."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from condzoo.training.schedules import learning_rate, resets_momentum
from condzoo.training.schema import Schedule

PER_EPOCH, EPOCHS, LR = 7, 6, 0.4
TOTAL = PER_EPOCH * EPOCHS


def ours(**fields: Any) -> list[float]:
    schedule = TypeAdapter(Schedule).validate_python(fields)
    return [learning_rate(schedule, LR, s, steps_per_epoch=PER_EPOCH, total_steps=TOTAL) for s in range(TOTAL)]


def torchs(build: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler, rates = build(optimizer), []
    for step in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < TOTAL - 1:
            scheduler.step()
    return rates


def warmed(after: Callable[[torch.optim.Optimizer], LRScheduler]) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """Two epochs of linear warm-up from 1/n, then another schedule."""

    def build(optimizer: torch.optim.Optimizer) -> LRScheduler:
        steps = 2 * PER_EPOCH
        first = LinearLR(optimizer, 1 / steps, 1.0, steps - 1)
        return SequentialLR(optimizer, [first, after(optimizer)], [steps])

    return build


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.5])
def test_one_cycle(anneal: str, pct_start: float) -> None:
    def build(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return OneCycleLR(optimizer, LR, TOTAL, pct_start=pct_start, anneal_strategy=anneal, cycle_momentum=False)

    got = ours(name="onecycle", pct_start=pct_start, anneal=anneal)
    assert got == pytest.approx(torchs(build), rel=1e-9)
    assert got[-1] == pytest.approx(LR / 25 / 1e4)


@pytest.mark.parametrize(("total", "pct_start"), [(23, 0.967), (8, 0.06), (3, 0.7), (3, 0.2), (2, 0.2), (1, 0.3)])
def test_one_cycle_with_less_than_a_step_up_or_down(total: int, pct_start: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = OneCycleLR(optimizer, LR, total, pct_start=pct_start, cycle_momentum=False)
    schedule = TypeAdapter(Schedule).validate_python({"name": "onecycle", "pct_start": pct_start})
    for step in range(total):
        got = learning_rate(schedule, LR, step, steps_per_epoch=1, total_steps=total)
        assert got == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_step_by_epoch_and_by_iteration() -> None:
    expected = torchs(lambda o: MultiStepLR(o, [2 * PER_EPOCH, 5 * PER_EPOCH], gamma=0.1))
    assert ours(name="step", milestones=[2, 5]) == pytest.approx(expected, rel=1e-12)
    by_step = ours(name="step", milestones=[2 * PER_EPOCH, 5 * PER_EPOCH], unit="iteration")
    assert by_step == pytest.approx(expected, rel=1e-12)
    assert ours(name="step", milestones=[100]) == [LR] * TOTAL


def test_cosine() -> None:
    expected = torchs(lambda o: CosineAnnealingLR(o, TOTAL, eta_min=0.01))
    assert ours(name="cosine", min_lr=0.01) == pytest.approx(expected, rel=1e-9)


def test_warm_up_then_cosine() -> None:
    rest = TOTAL - 2 * PER_EPOCH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own use of the old call
        expected = torchs(warmed(lambda o: CosineAnnealingLR(o, rest)))
    assert ours(name="cosine", warmup_epochs=2) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_constant_and_its_warm_up() -> None:
    assert ours(name="constant") == [LR] * TOTAL
    rates = ours(name="constant", warmup_epochs=1)
    assert rates[:PER_EPOCH] == pytest.approx([LR * (s + 1) / PER_EPOCH for s in range(PER_EPOCH)])
    assert rates[PER_EPOCH:] == [LR] * (TOTAL - PER_EPOCH)


def test_momentum_is_reset_at_the_first_step_of_a_milestone_only() -> None:
    for reset, expected in ((True, [14, 35]), (False, [])):
        fields = {"name": "step", "milestones": [2, 5], "reset_momentum": reset}
        schedule = TypeAdapter(Schedule).validate_python(fields)
        assert [s for s in range(TOTAL) if resets_momentum(schedule, s, PER_EPOCH)] == expected


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_very_short_one_cycle_is_finite_and_positive(total: int) -> None:
    schedule = TypeAdapter(Schedule).validate_python({"name": "onecycle"})
    for step in range(total):
        assert 0 < learning_rate(schedule, LR, step, steps_per_epoch=1, total_steps=total) <= LR


@pytest.mark.parametrize("fields", [{"name": "constant"}, {"name": "cosine"}, {"name": "step", "milestones": [3]}])
def test_a_warm_up_in_iterations_is_that_in_epochs(fields: dict[str, Any]) -> None:
    def rates(**warmup: float) -> list[float]:
        schedule = TypeAdapter(Schedule).validate_python({**fields, **warmup})
        return [learning_rate(schedule, 0.1, step, steps_per_epoch=10, total_steps=60) for step in range(60)]

    assert rates(warmup_iterations=15) == rates(warmup_epochs=1.5)
    assert rates(warmup_iterations=15)[0] == pytest.approx(0.1 / 15)
