"""The network that is evaluated and written: an average gets BatchNorm's statistics under its own weights.

The mean of the statistics that the weights had on their way is not what the mean of the weights gives: while the
learning rate is high an averaged ResNet-56 errs by it on most test images. At the end of a schedule that goes
to zero the two agree.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from condzoo.data import Batch
from condzoo.training.distributed import Ranks, share_buffers
from condzoo.training.preparation import Training, pieces
from condzoo.training.steps import seed_step

IMAGES = 10_000  # of the first epoch, shuffled and augmented as in training


@contextlib.contextmanager
def evaluated(training: Training) -> Iterator[nn.Module]:
    """The result of a training as it is now; all of its processes ask for it together.

    What is measured here is not part of the training's state: afterwards that is as it was. Where a statistic comes out
    infinite, as in a training about to diverge, the average of those in training stands.

    Raises:
        ValueError, OSError: training images that cannot be read, by whichever process.
    """
    network, ranks = training.result, training.ranks
    share_buffers(network, ranks)
    if training.average is None:
        yield network
        return
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        batches: Iterable[Batch] = statistics_batches(training)
        if training.recipe.sync_bn:  # each forward pass waits for all processes: none may fail on the way
            batches = ranks.all_do(lambda: [(x.cpu(), y.cpu()) for x, y in batches])  # in float32 gigabytes of a GPU
        ranks.all_do(lambda: measure_statistics(training, network, batches))
        share_mean(network, ranks)
        for buffer, kept in zip(network.buffers(), before, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, kept))
        yield network
    finally:
        for buffer, kept in zip(network.buffers(), before, strict=True):
            buffer.copy_(kept)


def statistics_batches(training: Training) -> Iterator[Batch]:
    """What statistics are measured on: batches, or their pieces where the recipe accumulates, as in training.

    Of several processes each takes its part of every one.
    """
    size = min(training.plan.batch_size, training.data.size("train"))
    plan = replace(training.plan, batch_size=size, drop_last=True)
    for x, y in itertools.islice(training.data.train_batches(plan, 0), max(1, IMAGES // size)):
        yield from pieces(training, x, y, size)


def measure_statistics(training: Training, network: nn.Module, batches: Iterable[Batch]) -> None:
    """BatchNorm's statistics anew, the mean over the batches, which are `statistics_batches`' pieces.

    Stochastic depth and dropout draw as in the first step: what is written has the statistics that were evaluated.
    """
    norms = {module: module.momentum for module in network.modules() if isinstance(module, _BatchNorm)}
    calls: Counter[nn.Module] = Counter()

    def averages(norm: _BatchNorm, _: object) -> None:  # without a momentum BatchNorm reads its own counter from a GPU
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]

    was_training = network.training
    seed_step(training, 0)
    with contextlib.ExitStack() as held:
        held.callback(network.train, was_training)
        for norm, momentum in norms.items():
            held.callback(setattr, norm, "momentum", momentum)
            held.callback(norm.register_forward_pre_hook(averages).remove)
            norm.reset_running_stats()
        held.enter_context(torch.no_grad())
        held.enter_context(training.numerics.autocast())
        network.train()
        for x, _ in batches if norms else ():
            network(x.to(training.numerics.device))


def share_mean(network: nn.Module, ranks: Ranks) -> None:
    """Give every process the mean of all processes' statistics; none may be missing."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            for statistic in (module.running_mean, module.running_var):
                ranks.sum_(statistic).div_(ranks.world)
