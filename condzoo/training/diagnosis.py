"""Which loss, gradient, running statistic or weight is not finite, and where that begins."""

from functools import partial

import torch
from torch import Tensor

from condzoo.training.divergence import Fault, NonFinite
from condzoo.training.preparation import Training, training_steps
from condzoo.training.steps import mean_loss, seed_step

KINDS = ("loss", "gradient", "running statistic")  # the first that any process finds is believed


def check_weights(training: Training, step: int) -> None:
    """See that the weights after `step` steps are finite; of others the loss of the next step tells, if there is one.

    Raises:
        NonFinite: they are not, in any process.
    """
    mine = (name for name, p in training.model.named_parameters() if not torch.isfinite(p).all())
    for name in training.ranks.gather(next(mine, None)):
        if name is not None:
            raise NonFinite(step, Fault("weight", step - 1, name))


def diagnose(training: Training, step: int) -> Fault:
    """Take the bad step again without its update, from the state before it.

    Every process looks at its own images; the first that finds a loss, else the first that finds a gradient,
    else the first that finds a statistic is believed.
    """
    findings = training.ranks.gather(_find(training, step))
    for what in KINDS:
        for found in findings:
            if found is not None and found[0] == what:
                return Fault(what, step, found[1])
    return Fault("gradient", step, "the norm of all parameters together")


def _find(training: Training, step: int) -> tuple[str, str] | None:
    """(one of KINDS, where) of this process's part of a step; None where all is finite."""
    training.optimizer.zero_grad()
    training.guard.remember()
    finite_before = _finite_buffers(training)
    (batch,) = training_steps(training, step, step + 1)
    seed_step(training, step)
    met: list[str] = []

    def note(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            met.append(name)

    # What is not finite spreads from where a backward pass makes it to every layer below: the first met is the origin.
    named = [(name, p) for name, p in training.model.named_parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(partial(note, name)) for name, p in named]
    try:
        for x, y in batch.chunks:
            with training.numerics.autocast():
                logits = training.model(x)
            loss = mean_loss(training.recipe, logits, y)
            bad = not torch.isfinite(loss)
            if _bad_for_all(training, bad):
                where = _first_layer(training, x)
                return ("loss", where) if bad else None
            (loss * (len(y) / batch.images)).backward()
        if met:
            return "gradient", met[0]
        finite = _finite_buffers(training)
        overflown = [name for name in finite_before if name not in finite]
        return ("running statistic", overflown[0]) if overflown else None
    finally:
        for handle in handles:
            handle.remove()
        training.guard.restore()
        training.optimizer.zero_grad()


def _finite_buffers(training: Training) -> list[str]:
    """The names of the buffers in which all is finite."""
    return [name for name, buffer in training.model.named_buffers() if torch.isfinite(buffer).all()]


def _bad_for_all(training: Training, bad: bool) -> bool:
    """Whether this pass is looked at again: with SyncBatchNorm, which waits for all processes, by all of them alike."""
    return bool(training.ranks.largest(int(bad))) if training.recipe.sync_bn else bad


@torch.no_grad()
def _first_layer(training: Training, x: Tensor) -> str:
    """The first module, in the order of a forward pass of x, whose output is not finite."""
    found: list[str] = []

    def check(name: str, output: object) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            found.append(name)

    leaves = [(n, m) for n, m in training.model.named_modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(lambda _m, _x, h, n=n: check(n, h)) for n, m in leaves]
    try:
        with training.numerics.autocast():
            training.model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"
