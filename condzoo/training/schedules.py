"""The learning rate of a step: a function of the step alone, so a resumed run needs no scheduler state."""

import math

from condzoo.training.schema import Constant, Cosine, OneCycle, Schedule, Step


def learning_rate(schedule: Schedule, lr: float, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of `step` (from 0) in a run of `total_steps`.

    Args:
        schedule: the recipe's [schedule].
        lr: the optimizer's learning rate, which the schedule scales.
    """
    match schedule:
        case OneCycle():
            return _one_cycle(schedule, lr, step, total_steps)
        case Step():
            passed = sum(milestone <= step for milestone in milestone_steps(schedule, steps_per_epoch))
            return lr * schedule.gamma**passed * _warmup(schedule, step, steps_per_epoch)
        case Cosine():
            start = warmup_steps(schedule, steps_per_epoch)
            share = max(step - start, 0) / max(total_steps - start, 1)
            cosine = schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * share)) / 2
            return cosine * _warmup(schedule, step, steps_per_epoch)
        case Constant():
            return lr * _warmup(schedule, step, steps_per_epoch)


def milestone_steps(schedule: Schedule, steps_per_epoch: int) -> list[int]:
    """The first step after each milestone; empty for a schedule without milestones."""
    if not isinstance(schedule, Step):
        return []
    return [m * (steps_per_epoch if schedule.unit == "epoch" else 1) for m in schedule.milestones]


def resets_momentum(schedule: Schedule, step: int, steps_per_epoch: int) -> bool:
    """Whether the optimizer forgets its state before `step`."""
    return isinstance(schedule, Step) and schedule.reset_momentum and step in milestone_steps(schedule, steps_per_epoch)


def warmup_steps(schedule: Constant, steps_per_epoch: int) -> int:
    """The steps of the warm-up, given in epochs or in steps."""
    return schedule.warmup_iterations or round(schedule.warmup_epochs * steps_per_epoch)


def _warmup(schedule: Constant, step: int, steps_per_epoch: int) -> float:
    """Linear from 1/n at step 0 to 1 at step n - 1, n the steps of the warm-up."""
    steps = warmup_steps(schedule, steps_per_epoch)
    return min((step + 1) / steps, 1.0) if steps else 1.0


def _one_cycle(schedule: OneCycle, lr: float, step: int, total_steps: int) -> float:
    """torch's OneCycleLR: from lr / div_factor up to lr at the peak's step, then down to the end.

    The peak need not be at a whole step, nor in the run: where the way up is shorter than a step, it is before step 0.
    """
    first = lr / schedule.div_factor
    peak_step = schedule.pct_start * total_steps - 1
    if step <= peak_step:
        return _anneal(schedule.anneal, first, lr, step / peak_step if peak_step else 1.0)
    share = (step - peak_step) / (total_steps - 1 - peak_step)
    return _anneal(schedule.anneal, lr, first / schedule.final_div_factor, share)


def _anneal(shape: str, start: float, end: float, share: float) -> float:
    if shape == "linear":
        return start + (end - start) * share
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
