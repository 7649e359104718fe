"""A step whose loss, gradient or BatchNorm statistics are not finite is not taken: how that is seen and kept to.

On a CPU every step is checked before its update. Reading a number back from a GPU would stop it in every
step, so there the check stays on the device: the update of a bad step and of every one after it is masked
out by the optimizer itself, and the host reads every few steps whether there was one. Either way the run
ends with the weights, the optimizer's state and BatchNorm's statistics of before the bad step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = list[Tensor] | tuple[Tensor, ...]
ALIGNMENT = 16  # elements: kernels may want more than an element's own


@dataclass(frozen=True)
class Fault:
    """`what`: "loss", "gradient", "running statistic" or "weight"; `where`: the module or tensor it is seen in first.

    A weight is what the step left, the others are met within it.
    """

    what: str
    step: int
    where: str

    @property
    def text(self) -> str:
        """In words."""
        when = "after" if self.what == "weight" else "of"
        return f"the {self.what} {when} step {self.step} is not finite, first in {self.where}"


class NonFinite(ArithmeticError):
    """A loss, gradient or running statistic that is not finite, and `step` was not taken.

    Or, with `fault`, a weight that is so before `step`, which nothing else would tell: the run ends or is saved there.
    """

    def __init__(self, step: int, fault: Fault | None = None) -> None:
        said = f"the loss, the gradient or a running statistic of step {step} is not finite"
        super().__init__(said if fault is None else fault.text)
        self.step, self.fault = step, fault


class Guard:
    """Watches for the first bad step, and keeps what a forward pass changes (BatchNorm's statistics) from before it.

    Attributes:
        deferred: the check stays on the device.
        health: 1, and NaN from the first bad step on: a loss times it keeps every later step from counting.
        bad_step: the first bad step's number; -1 while there is none.
        sound: whether the latest step counts, 1 or 0.
    """

    def __init__(self, model: nn.Module, device: torch.device, deferred: bool) -> None:
        self.deferred = deferred
        self.health = torch.ones((), device=device)
        self.sound = torch.ones((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.buffers = list(_in_one_piece(model))
        self.before = [buffer.clone() for buffer in self.buffers]

    def remember(self) -> None:
        """Keep the buffers as they are before a step."""
        for kept, buffer in zip(self.before, self.buffers, strict=True):
            kept.copy_(buffer)

    def restore(self) -> None:
        """Put back the buffers of before the step."""
        for kept, buffer in zip(self.before, self.buffers, strict=True):
            buffer.copy_(kept)

    def weight(self, loss: Tensor) -> Tensor:
        """1, which makes the loss and every gradient of a step NaN where it is NaN: from the first bad step on."""
        return torch.where(torch.isfinite(loss.detach()) & self.finite_statistics(), self.health, torch.nan)

    def finite_statistics(self) -> Tensor:
        """Whether all is finite in the buffers that was so before the step (a mask may hold infinities); bool [].

        A running variance may overflow in a forward pass whose outputs are finite: they are divided by the batch's.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.health.device)
        for kept, buffer in zip(self.before, self.buffers, strict=True):
            if buffer.is_floating_point():
                finite = finite & (buffer.isfinite() | ~kept.isfinite()).all()
        return finite

    def note(self, finite: Tensor, step: int) -> None:
        """Take in, on the device, whether a step is finite; from the first that is not on, none counts."""
        finite = finite & self.health.isfinite()
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, step)
        self.health = torch.where(finite, self.health, torch.nan)
        self.sound = finite.to(self.sound.dtype)
        for kept, buffer in zip(self.before, self.buffers, strict=True):
            torch.where(finite, buffer, kept, out=buffer)

    def check(self) -> None:
        """Read back whether there was a bad step; this waits for a GPU.

        Raises:
            NonFinite: there was.
        """
        step = int(self.bad_step)
        if step >= 0:
            raise NonFinite(step)


class Averaging:
    """mean + (1 - decay) * (new - mean), for AveragedModel's multi_avg_fn; steps that do not count leave the mean.

    A number of batches (BatchNorm's) is the network's own: the mean of a count, cut to a whole number, says nothing.
    """

    def __init__(self, guard: Guard, decay: float) -> None:
        self.guard, self.decay = guard, decay

    @torch.no_grad()
    def __call__(self, means: Tensors, new: Tensors, taken: Tensor | int) -> None:
        """Update the means in place."""
        if not means[0].is_floating_point():
            torch._foreach_copy_(means, new)
        elif self.guard.deferred:
            steps = torch._foreach_sub(new, means)
            torch._foreach_mul_(steps, (1 - self.decay) * self.guard.sound)
            torch._foreach_add_(means, steps)
        else:
            torch._foreach_lerp_(means, new, 1 - self.decay)


@torch.no_grad()
def update_average(average: AveragedModel, model: nn.Module) -> None:
    """`average.update_parameters(model)`, without its copy of the number of steps to the device, which waits for a GPU.

    Args:
        average: with an `Averaging` as its multi_avg_fn, and use_buffers.
        model: what is averaged.
    """
    kept, now = ((*network.parameters(), *network.buffers()) for network in (average.module, model))
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for mean, new in zip(kept, now, strict=True):
        means, news = by_dtype.setdefault(mean.dtype, ([], []))
        means.append(mean)
        news.append(new)
    taken = int(average.n_averaged)  # it is on the CPU
    for means, news in by_dtype.values():
        if taken:
            average.multi_avg_fn(means, news, taken)  # type: ignore[misc]
        else:
            torch._foreach_copy_(means, news)
    average.n_averaged += 1


def _in_one_piece(model: nn.Module) -> Iterator[Tensor]:
    """Lay the buffers of each dtype out in one tensor, so that keeping all of them is one copy; yields these."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in places:
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
            places.setdefault(id(buffer), []).append((module, name))
    for buffers in by_dtype.values():
        sizes = [-(-buffer.numel() // ALIGNMENT) * ALIGNMENT for buffer in buffers]
        whole = buffers[0].new_zeros(sum(sizes))
        for buffer, room in zip(buffers, whole.split(sizes), strict=True):
            piece = room[: buffer.numel()].view(buffer.shape).copy_(buffer)
            for module, name in places[id(buffer)]:
                setattr(module, name, piece)
        yield whole
