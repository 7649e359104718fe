"""One optimizer step, and what is watched while it is taken."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from condzoo.data import derived_seed
from condzoo.probe import Probe
from condzoo.training.divergence import NonFinite, update_average
from condzoo.training.optimizers import forget, set_learning_rate
from condzoo.training.preparation import StepBatch, Training
from condzoo.training.schedules import learning_rate, resets_momentum
from condzoo.training.schema import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """Sums over the images of a step, over all processes, on the device; and the scalars of the update."""

    loss_sum: Tensor  # float64 []
    correct: Tensor  # int64 []
    images: int
    lr: float
    grad_norm: Tensor  # []


def take_step(training: Training, batch: StepBatch, probe: Probe | None = None) -> StepResult:
    """Forward, backward and update for one step, which the probe watches.

    Raises:
        OSError: the probe's record cannot be written.
        NonFinite: before anything is updated. Where checks are deferred, only in steps that the probe watches;
            in others the update is masked out, and `training.guard` knows.
    """
    recipe, optimizer, step = training.recipe, training.optimizer, batch.step
    watched = probe is not None and probe.due
    seed_step(training, step)
    if resets_momentum(recipe.schedule, step, training.steps_per_epoch):
        forget(optimizer)
    lr = learning_rate_of(training, step)
    set_learning_rate(optimizer, lr)
    optimizer.zero_grad()
    training.guard.remember()
    # A compiled network runs past the probe's hooks: the steps that are measured use the network itself.
    loss_sum, correct = accumulate_gradient(training, batch, training.parallel if watched else training.forward)
    grad_norm = gradient_norm(training)
    sound = torch.isfinite(loss_sum)
    if not training.scaler.is_enabled():  # a scaler skips gradients that overflow, and lowers its scale
        sound = sound & torch.isfinite(grad_norm)
    settle(training, sound, step)
    clip_gradient(training, grad_norm)
    if probe is not None and watched:
        probe.loss_scale = training.scaler.get_scale() * training.ranks.world / batch.images
    training.scaler.step(optimizer)
    training.scaler.update()
    if watched and training.guard.deferred:
        training.guard.check()
    if probe is not None and watched:
        training.ranks.all_do(probe.step)  # the first one writes, and where it cannot, all end with that error
    elif probe is not None:
        probe.step()
    if training.average is not None:
        update_average(training.average, training.model)
    if training.guard.deferred:
        loss_sum, correct = (torch.where(training.guard.sound > 0, value, 0) for value in (loss_sum, correct))
    return StepResult(loss_sum, correct, batch.images, lr, grad_norm)


def seed_step(training: Training, step: int) -> None:
    """Seed the random numbers of a step (dropout) by the step, so that they are the same in a resumed run.

    The first of several processes draws what one process draws; the others each their own.
    """
    rank = training.ranks.rank
    torch.manual_seed(derived_seed(training.recipe.seed, step, *([rank] if rank else [])))


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
    """Gradients of the mean loss over the global batch into .grad; returns its (sum of losses, right answers).

    The average over processes, taken with the last chunk, is the mean over the global batch whatever the
    processes' parts are: each loss has the weight of its images, times the number of processes.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=training.numerics.device)
    for (x, y), last in with_last(batch.chunks):
        with contextlib.nullcontext() if last else unsynchronized(training.parallel):
            with training.numerics.autocast():
                logits = forward(x)
            loss = mean_loss(training.recipe, logits, y)
            loss = loss * training.guard.weight(loss)  # NaN in one process makes the sum and the average NaN in all
            share = len(y) * training.ranks.world / batch.images
            weighted = loss * share if share != 1 else loss
            training.scaler.scale(weighted).backward()
        sums += torch.stack([loss.detach().double() * len(y), (logits.detach().argmax(1) == y).sum().double()])
    loss_sum, correct = training.ranks.sum_(sums)
    return loss_sum, correct.long()


def mean_loss(recipe: Recipe, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over images, in float32; 0 for no images, which a process gets of a very short last batch."""
    if not len(labels):
        return logits.float().sum()
    return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=recipe.loss.label_smoothing)


def unsynchronized(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Backward passes that only add to this process's gradients: for all chunks of a step but the last."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def with_last(entries: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """(entry, whether it is the last) of every entry."""
    waiting: list[T] = []
    for entry in entries:
        for before in waiting:
            yield before, False
        waiting = [entry]
    for before in waiting:
        yield before, True


def gradient_norm(training: Training) -> Tensor:
    """The norm of the whole gradient; the scaler's factor is taken out first."""
    training.scaler.unscale_(training.optimizer)
    return nn.utils.get_total_norm([p.grad for p in training.model.parameters() if p.grad is not None])


def settle(training: Training, sound: Tensor, step: int) -> None:
    """Go no further with a step that is not sound; where checks are deferred, let the optimizer mask it out.

    Raises:
        NonFinite: it is not, and checks are not deferred.
    """
    guard = training.guard
    if guard.deferred:
        guard.note(sound, step)
        if not training.scaler.is_enabled():  # a scaler sees that the gradients are NaN
            training.optimizer.found_inf = 1 - guard.sound  # type: ignore[attr-defined]
    elif not sound:
        guard.restore()
        raise NonFinite(step)


def clip_gradient(training: Training, norm: Tensor) -> None:
    """Scale the gradient down to the recipe's grad_clip where its norm is above."""
    if training.recipe.grad_clip is not None:
        parameters = [p for p in training.model.parameters() if p.grad is not None]
        nn.utils.clip_grads_with_norm_(parameters, training.recipe.grad_clip, norm)
