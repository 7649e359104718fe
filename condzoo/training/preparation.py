"""Everything a training needs, built from its recipe: data, network, optimizer, average, arithmetic."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from condzoo.data import Batch, BatchPlan, DataSet, batches_per_epoch
from condzoo.training.data_sets import read_data
from condzoo.training.networks import build_network, freeze
from condzoo.training.optimizers import build_optimizer
from condzoo.training.precision import Numerics, resolve_numerics
from condzoo.training.schema import FullBatch, Recipe


@dataclass(frozen=True)
class Training:
    """The parts of a run. `forward` is the network as trained, compiled where the recipe says so."""

    recipe: Recipe
    data: DataSet
    plan: BatchPlan
    numerics: Numerics
    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    total_steps: int

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and released: the average where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def full_batch(self) -> bool:
        """Whether every step uses the whole training set."""
        return isinstance(self.recipe.optim, FullBatch)


def prepare(recipe: Recipe, device: torch.device, data_root: str | Path | None = None) -> Training:
    """Build the parts; the weights are drawn from torch's global generator under the recipe's seed.

    Args:
        recipe: checked.
        device: where data and network live.
        data_root: instead of the recipe's data.root.

    Raises:
        ValueError, FileNotFoundError: see `load_data`, `build_network`, `build_optimizer`.
    """
    data = read_data(recipe, data_root).to(device)
    torch.manual_seed(recipe.seed)
    model = build_network(recipe.model, data.image_shape, data.num_classes)
    freeze(model, recipe.freeze)
    numerics = resolve_numerics(recipe, model, device)
    model = place(model, numerics).train()
    plan = BatchPlan(
        recipe.data.batch_size,
        recipe.data.augment,
        recipe.seed,
        recipe.data.drop_last,
        numerics.channels_last,
    )
    full_batch = isinstance(recipe.optim, FullBatch)
    steps = 1 if full_batch else batches_per_epoch(data.size("train"), plan.batch_size, plan.drop_last)
    average = None
    if recipe.ema is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    return Training(
        recipe=recipe,
        data=data,
        plan=plan,
        numerics=numerics,
        model=model,
        forward=torch.compile(model) if recipe.compile else model,
        optimizer=build_optimizer(recipe.optim, model),
        average=average,
        scaler=torch.amp.GradScaler(device.type, enabled=numerics.precision == "fp16"),
        steps_per_epoch=steps,
        total_steps=recipe.iterations or (recipe.epochs or 0) * steps,
    )


def place(model: nn.Module, numerics: Numerics) -> nn.Module:
    """The model on the run's device, in its memory format."""
    model = model.to(numerics.device)
    return model.to(memory_format=torch.channels_last) if numerics.channels_last else model  # type: ignore[call-overload]


@dataclass(frozen=True)
class StepBatch:
    """The images of one step: its gradient is the mean over all `images`, taken chunk by chunk."""

    step: int
    images: int
    chunks: Iterator[Batch]


def training_steps(training: Training, start: int, stop: int) -> Iterator[StepBatch]:
    """The images of every step in [start, stop), over as many epochs as that takes."""
    data, parts = training.data, training.recipe.accumulate
    step = start
    while step < stop:
        epoch, first = divmod(step, training.steps_per_epoch)
        if training.full_batch:
            yield StepBatch(step, data.size("train"), data.ordered_batches("train", training.plan))
            step += 1
            continue
        for x, y in data.train_batches(training.plan, epoch, first):
            yield StepBatch(step, len(y), zip(x.chunk(parts), y.chunk(parts), strict=True))
            step += 1
            if step == stop:
                return
