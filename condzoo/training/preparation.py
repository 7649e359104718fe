"""Everything a training needs, built from its recipe: data, network, optimizer, average, arithmetic."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from condzoo.data import Batch, BatchPlan, DataSet, batches_per_epoch
from condzoo.training.data_sets import read_data
from condzoo.training.distributed import ALONE, FORESEEN, Ranks, synchronize_norms, wrap
from condzoo.training.divergence import Averaging, Guard
from condzoo.training.host_memory import keep_freed_memory
from condzoo.training.networks import freeze, network_of
from condzoo.training.optimizers import build_optimizer
from condzoo.training.parts import check_parts
from condzoo.training.precision import Numerics, resolve_numerics
from condzoo.training.schema import FullBatch, Recipe


@dataclass(frozen=True)
class Training:
    """The parts of a run, in one of its processes.

    `model` is the network; `parallel` the same with gradients averaged over the processes; `forward` that as
    it is trained, compiled where the recipe says so. `unreadable` holds what `readable` met.
    """

    recipe: Recipe
    data: DataSet
    plan: BatchPlan
    numerics: Numerics
    ranks: Ranks
    guard: Guard
    model: nn.Module
    parallel: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    total_steps: int
    unreadable: list[Exception] = field(default_factory=list)

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and released: the average where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def full_batch(self) -> bool:
        """Whether every step uses the whole training set."""
        return isinstance(self.recipe.optim, FullBatch)


def prepare(
    recipe: Recipe, device: torch.device, data_root: str | Path | None = None, ranks: Ranks = ALONE
) -> Training:
    """Build the parts; the weights are drawn from torch's global generator under the recipe's seed.

    Of several processes each builds its own; `join_gradients` then ties them together.

    Args:
        recipe: checked.
        device: where data and network live.
        data_root: instead of the recipe's data.root.
        ranks: this process among those of the run.

    Raises:
        ValueError, FileNotFoundError: see `load_data`, `check_parts`, `network_of`, `build_optimizer`.
    """
    if ranks.world > recipe.data.batch_size:
        raise ValueError(
            f"data.batch_size: got {recipe.data.batch_size}, must be at least the number of processes ({ranks.world})"
        )
    if device.type == "cpu":
        keep_freed_memory()
    data = read_data(recipe, data_root)
    check_parts(recipe, data.size("train"), data.num_classes, ranks.world)
    data = data.to(device)
    torch.manual_seed(recipe.seed)
    model = network_of(recipe.model, data.image_shape, data.num_classes)
    freeze(model, recipe.freeze)
    numerics = resolve_numerics(recipe, model, device)
    if recipe.sync_bn:
        model = synchronize_norms(model, ranks, device)
    model = place(model, numerics).train()
    guard = Guard(model, device, deferred=checks_are_deferred(device))
    plan = BatchPlan(
        recipe.data.batch_size,
        recipe.data.augment,
        recipe.seed,
        recipe.data.drop_last,
        numerics.channels_last,
        ranks.rank,
        ranks.world,
        recipe.data.cutout,
    )
    full_batch = isinstance(recipe.optim, FullBatch)
    steps = 1 if full_batch else batches_per_epoch(data.size("train"), plan.batch_size, plan.drop_last)
    return Training(
        recipe=recipe,
        data=data,
        plan=plan,
        numerics=numerics,
        ranks=ranks,
        guard=guard,
        model=model,
        parallel=model,
        forward=torch.compile(model) if recipe.compile else model,
        optimizer=build_optimizer(recipe.optim, model, fused=guard.deferred),
        average=None if recipe.ema is None else averaged(model, recipe.ema, guard),
        scaler=torch.amp.GradScaler(device.type, enabled=numerics.precision == "fp16"),
        steps_per_epoch=steps,
        total_steps=recipe.iterations or (recipe.epochs or 0) * steps,
    )


def join_gradients(training: Training) -> Training:
    """The training with gradients averaged over its processes; all of them call it together."""
    ranks, recipe = training.ranks, training.recipe
    if ranks.world == 1:
        return training
    parallel = wrap(training.model, ranks, training.numerics.device)
    settle_buckets(training, parallel)
    # torch.compile goes around DistributedDataParallel, which it then cuts where gradients are sent.
    return replace(training, parallel=parallel, forward=torch.compile(parallel) if recipe.compile else parallel)


def settle_buckets(training: Training, parallel: nn.Module) -> None:
    """One backward pass of black images, of which nothing stays.

    DistributedDataParallel sorts gradients into other buckets after its first backward pass, and where a
    gradient lies decides in which order more than two processes' are added: without this, a resumed run
    would round one step as a new run does.
    """
    training.guard.remember()
    black = torch.zeros(2, *training.data.image_shape, device=training.numerics.device)
    with training.numerics.autocast():
        logits = parallel(black)
    logits.sum().backward()
    training.optimizer.zero_grad()
    training.guard.restore()


def averaged(model: nn.Module, decay: float, guard: Guard) -> AveragedModel:
    """An exponential average of the network's weights and buffers."""
    return AveragedModel(model, multi_avg_fn=Averaging(guard, decay), use_buffers=True)


def checks_are_deferred(device: torch.device) -> bool:
    """Whether reading a number back would hold the device up (see `condzoo.training.divergence`)."""
    return device.type == "cuda"


def place(model: nn.Module, numerics: Numerics) -> nn.Module:
    """The model on the run's device, in its memory format."""
    model = model.to(numerics.device)
    return model.to(memory_format=torch.channels_last) if numerics.channels_last else model  # type: ignore[call-overload]


@dataclass(frozen=True)
class StepBatch:
    """The images of one step: its gradient is the mean over all `images`, taken chunk by chunk.

    `images` counts those of all processes, `chunks` are this one's.
    """

    step: int
    images: int
    chunks: Iterator[Batch]


def readable(training: Training, batches: Iterator[Batch], of_a_step: int = 1) -> Iterator[Batch]:
    """The batches; in place of one that this process of several cannot read, and of all after it in its step, NaN.

    The others wait for this process's gradient, and for what SyncBatchNorm has of each forward pass, so it must take
    part in the step. NaN in one process makes the step unsound in all: none takes it, and all stop at the same place,
    where they ask for `unreadable`.

    Args:
        training: its parts.
        batches: this process's part of each.
        of_a_step: how many of them make a step.
    """
    if training.ranks.world == 1:
        yield from batches
        return
    taken = 0
    try:
        for batch in batches:
            yield batch
            taken += 1
    except FORESEEN as error:
        training.unreadable.append(error)
        shape, device = training.data.image_shape, training.numerics.device
        count = 2 * training.recipe.accumulate  # BatchNorm takes no part of one image
        for _ in range(of_a_step - taken % of_a_step):
            yield (
                torch.full((count, *shape), torch.nan, device=device),
                torch.zeros(count, dtype=torch.int64, device=device),
            )


def first_unreadable(training: Training) -> None:
    """Raise what kept a process from reading its images; `ranks.all_do` raises it in all of them."""
    for error in training.unreadable:
        raise error


def pieces(training: Training, x: Tensor, y: Tensor, images: int) -> Iterator[Batch]:
    """This process's part of a batch of `images`, piece by piece, as the recipe accumulates.

    In each forward pass of SyncBatchNorm the processes wait for each other: with it all have as many pieces, and an
    image of every piece (`check_parts` has seen that there are enough).
    """
    parts, world = training.recipe.accumulate, training.ranks.world
    if training.recipe.sync_bn and world > 1:
        parts = max(1, min(parts, images // world))
        return zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)
    return zip(x.chunk(parts), y.chunk(parts), strict=True)


def training_steps(training: Training, start: int, stop: int) -> Iterator[StepBatch]:
    """The images of every step in [start, stop), over as many epochs as that takes."""
    data, step = training.data, start
    while step < stop:
        epoch, first = divmod(step, training.steps_per_epoch)
        if training.full_batch:
            images = data.size("train")
            count = batches_per_epoch(images, training.plan.batch_size, drop_last=False)
            yield StepBatch(step, images, readable(training, data.ordered_batches("train", training.plan), count))
            step += 1
            continue
        for x, y in readable(training, data.train_batches(training.plan, epoch, first)):
            left = data.size("train") - step % training.steps_per_epoch * training.plan.batch_size
            images = min(training.plan.batch_size, left)
            yield StepBatch(step, images, pieces(training, x, y, images))
            step += 1
            if step == stop:
                return
