"""One optimizer step, and what is watched while it is taken."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condzoo.data import derived_seed
from condzoo.probe import Probe
from condzoo.training.optimizers import set_learning_rate
from condzoo.training.preparation import StepBatch, Training
from condzoo.training.schedules import learning_rate, resets_momentum


class NonFinite(ArithmeticError):
    """A loss or gradient that is not finite; the step was not taken."""

    def __init__(self, what: str, step: int, where: str) -> None:
        super().__init__(f"the {what} of step {step} is not finite, first in {where}")
        self.what, self.step, self.where = what, step, where


@dataclass(frozen=True)
class StepResult:
    """Sums over the images of a step, on the device, and the scalars of the update."""

    loss_sum: Tensor  # float64 []
    correct: Tensor  # int64 []
    images: int
    lr: float
    grad_norm: float


def take_step(training: Training, batch: StepBatch, probe: Probe | None = None) -> StepResult:
    """Forward, backward and update for one step, which the probe watches.

    The random numbers of a step (dropout) are seeded by the step, so they are the same in a run that
    was resumed.

    Raises:
        NonFinite: before anything is updated.
    """
    recipe, optimizer, step = training.recipe, training.optimizer, batch.step
    torch.manual_seed(derived_seed(recipe.seed, step))
    if resets_momentum(recipe.schedule, step, training.steps_per_epoch):
        optimizer.state.clear()
    lr = learning_rate_of(training, step)
    set_learning_rate(optimizer, lr)
    optimizer.zero_grad()
    # A compiled network runs past the probe's hooks: the steps that are measured use the network itself.
    forward = training.model if probe is not None and probe.due else training.forward
    loss_sum, correct = accumulate_gradient(training, batch, forward)
    grad_norm = clip_gradient(training, step)
    if probe is not None:
        probe.loss_scale = training.scaler.get_scale() / batch.images
    training.scaler.step(optimizer)
    training.scaler.update()
    if probe is not None:
        probe.step()
    if training.average is not None:
        training.average.update_parameters(training.model)
    return StepResult(loss_sum, correct, batch.images, lr, grad_norm)


def learning_rate_of(training: Training, step: int) -> float:
    """The learning rate the schedule gives a step."""
    return learning_rate(
        training.recipe.schedule,
        training.recipe.optim.lr,
        step,
        steps_per_epoch=training.steps_per_epoch,
        total_steps=training.total_steps,
    )


def accumulate_gradient(
    training: Training, batch: StepBatch, forward: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss over the batch into .grad; returns (sum of losses, right answers)."""
    device = training.numerics.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    smoothing = training.recipe.loss.label_smoothing
    for x, y in batch.chunks:
        with training.numerics.autocast():
            logits = forward(x)
        loss = nn.functional.cross_entropy(logits.float(), y, label_smoothing=smoothing)
        if not torch.isfinite(loss):
            raise NonFinite("loss", batch.step, first_nonfinite_layer(training, x))
        share = len(y) / batch.images
        training.scaler.scale(loss * share if share != 1 else loss).backward()
        loss_sum += loss.detach().double() * len(y)
        correct += (logits.detach().argmax(1) == y).sum()
    return loss_sum, correct


@torch.no_grad()
def first_nonfinite_layer(training: Training, x: Tensor) -> str:
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


def clip_gradient(training: Training, step: int) -> float:
    """The norm of the whole gradient, which is scaled down to the recipe's grad_clip where it is above."""
    training.scaler.unscale_(training.optimizer)
    named = {n: p.grad for n, p in training.model.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(list(named.values()))
    if not training.scaler.is_enabled() and not torch.isfinite(norm):
        faulty = (name for name, grad in named.items() if not torch.isfinite(grad).all())
        raise NonFinite("gradient", step, next(faulty, "the norm of all parameters together"))
    if training.recipe.grad_clip is not None:
        parameters = [p for p in training.model.parameters() if p.grad is not None]
        nn.utils.clip_grads_with_norm_(parameters, training.recipe.grad_clip, norm)
    return float(norm)
