"""What a checkpoint claims, measured from its weights: logits, accuracy, conditioning. All in float32 on the CPU.

Shapes: B images, C channels, H x W pixels, K classes.
"""

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.data import BatchPlan, DataSet, load_data
from condzoo.probe import Conditioning, measure

EXPECTED_IMAGES = 2
IMAGE_FIELDS = ("crop", "resize", "image_size", "eval_resize", "interpolation", "num_classes", "validation", "dataset")
EVALUATION_BATCH = 1000
MEASURED_IMAGES = 1024  # at least: as many batches of the recipe's size as that takes


def fixed_input(shape: tuple[int, int, int, int]) -> Tensor:  # [B, C, H, W]
    """A synthetic input that is the same everywhere: Weyl's sequence by integer arithmetic, mean 0, variance 1."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    uniform = (i * 2654435761 % 2**32).double() / 2**32
    return ((uniform - 0.5) * 12**0.5).float().reshape(shape)


@torch.no_grad()
def logits_of(model: nn.Module, shape: tuple[int, int, int, int]) -> Tensor:  # [B, K]
    """Logits on `fixed_input`, in eval mode."""
    return model.eval()(fixed_input(shape))


def read_images(recipe: dict[str, Any], data_root: str | Path | None) -> DataSet:
    """The data set of a recipe, as its network saw it."""
    section = recipe["data"]
    return load_data(section["name"], data_root, **{field: section.get(field) for field in IMAGE_FIELDS})


@torch.no_grad()
def count_correct(model: nn.Module, data: DataSet) -> int:
    """Test images classified rightly, in eval mode, over every image."""
    model.eval()
    return sum(
        int((model(x).argmax(1) == y).sum()) for x, y in data.ordered_batches("test", BatchPlan(EVALUATION_BATCH))
    )


def measure_conditioning(model: nn.Module, data: DataSet, batch_size: int) -> Conditioning:
    """The probe in train mode (batch statistics) on the first training batches in seeded order, not augmented."""
    plan = BatchPlan(min(batch_size, data.size("train")), seed=0)
    batches = islice(data.train_batches(plan, epoch=0), -(-MEASURED_IMAGES // plan.batch_size))
    return measure(copy.deepcopy(model).train(), batches, seed=0)


def largest_difference(here: Conditioning, there: Conditioning) -> tuple[float, str]:
    """(largest relative difference in lambda_max of any layer's input and output gradient, the layer)."""
    if list(here) != list(there):
        raise ValueError(f"layers differ: measured {', '.join(here)}; recorded {', '.join(there)}")
    worst = (0.0, "")
    for name in here:
        for ours, theirs in (
            (here[name].input, there[name].input),
            (here[name].output_grad, there[name].output_grad),
        ):
            scale = max(abs(theirs.lambda_max), torch.finfo(torch.float64).tiny)
            worst = max(worst, (abs(ours.lambda_max - theirs.lambda_max) / scale, name))
    return worst
