"""What a checkpoint claims, measured from its weights: logits, accuracy, conditioning. All in float32 on the CPU.

Shapes: B images, C channels, H x W pixels, K classes.
"""

import copy
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.checkpoints.records import Expected
from condzoo.data import BatchPlan, DataSet, load_data
from condzoo.models import create_model
from condzoo.models.registry import FAMILIES
from condzoo.probe import Conditioning, Spectrum, measure

EXPECTED_IMAGES = 2
IMAGE_FIELDS = ("crop", "resize", "image_size", "eval_resize", "interpolation", "num_classes", "validation", "dataset")
EVALUATION_BATCH = 1000  # images, but no more pixels than so many of 32 x 32 have
EVALUATION_PIXELS = EVALUATION_BATCH * 32 * 32
TINY = torch.finfo(torch.float64).tiny
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


def logits_difference(model: nn.Module, expected: Expected) -> float:
    """Largest difference from the expected logits, as a share of the largest; ValueError where shapes differ."""
    logits = logits_of(model, expected.shape)
    wanted = logits.new_tensor(expected.logits)
    if wanted.shape != logits.shape:
        raise ValueError(f"recorded {list(wanted.shape)}, the network gives {list(logits.shape)}")
    return float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def read_images(recipe: dict[str, Any], data_root: str | Path | None, *, test_only: bool = False) -> DataSet:
    """The data set of a recipe, as its network saw it; `test_only`: see `load_data`.

    Raises:
        FileNotFoundError: not there; or the recipe names it by a place of its own, which is looked at only where the
            caller gives a data root: a checkpoint may be anyone's.
        ValueError: as `load_data`.
    """
    section = recipe["data"]
    if section.get("dataset") and data_root is None:
        raise FileNotFoundError(
            f"the recipe names a place of its own, {section['dataset']!r}; give a data root to have it read"
        )
    fields = {field: section.get(field) for field in IMAGE_FIELDS}
    return load_data(section["name"], data_root, **fields, test_only=test_only)


@torch.no_grad()
def count_correct(model: nn.Module, data: DataSet) -> int:
    """Test images classified rightly, in eval mode, over every image."""
    model.eval()
    _, height, width = data.image_shape
    at_once = max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // (height * width)))
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in data.ordered_batches("test", BatchPlan(at_once)))


def measure_conditioning(model: nn.Module, data: DataSet, batch_size: int) -> Conditioning:
    """The probe in train mode (batch statistics) on the first training batches in seeded order, not augmented."""
    plan = BatchPlan(min(batch_size, data.size("train")), seed=0)
    batches = islice(data.train_batches(plan, epoch=0), -(-MEASURED_IMAGES // plan.batch_size))
    return measure(copy.deepcopy(model).train(), batches, seed=0)


def initial_network(recipe: dict[str, Any], data: DataSet) -> nn.Module:
    """The network before the first step, as its training drew it; the global generator is left as it was.

    Args:
        recipe: of a registered model without arguments of its own (`release` takes no other).
    """
    section = recipe["model"]
    shape = data.image_shape
    mlp = section["name"] in FAMILIES["mlp"].rows
    arguments: dict[str, Any] = {"input_size": shape} if mlp else {"in_chans": shape[0]}
    arguments |= {key: section[key] for key in ("drop_rate", "last_bn_init") if key in section}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe["seed"])  # of the CPU alone: torch.manual_seed seeds GPUs, too
        return create_model(section["name"], num_classes=data.num_classes, init=section.get("init"), **arguments)


def largest_difference(
    here: Conditioning, there: Conditioning, difference: Callable[[Spectrum, Spectrum], float]
) -> tuple[float, str]:
    """(largest difference of the spectra of any layer's input and output gradient, the layer).

    Args:
        here, there: measured now, and recorded.
        difference: of a measured and a recorded spectrum; NaN is larger than any number.

    Raises:
        ValueError: other layers, or as `difference`.
    """
    if list(here) != list(there):
        raise ValueError(f"layers differ: measured {', '.join(here)}; recorded {', '.join(there)}")
    worst = (0.0, "")
    for name in here:
        for ours, theirs in (
            (here[name].input, there[name].input),
            (here[name].output_grad, there[name].output_grad),
        ):
            found = difference(ours, theirs)
            if math.isnan(found):
                return found, name
            worst = max(worst, (found, name))
    return worst


def lambda_max_difference(ours: Spectrum, theirs: Spectrum) -> float:
    """Relative difference in lambda_max."""
    return abs(ours.lambda_max - theirs.lambda_max) / max(abs(theirs.lambda_max), TINY)


def eigenvalue_difference(ours: Spectrum, theirs: Spectrum) -> float:
    """Largest relative difference of eigenvalues beyond our noise floor, under which rounding decides.

    Raises:
        ValueError: another number of eigenvalues.
    """
    here, there = ours.eigenvalues, theirs.eigenvalues
    if here.shape != there.shape:
        raise ValueError(f"{len(here)} eigenvalues measured, {len(there)} recorded")
    beyond = ((here - there).abs() - ours.noise_floor).clamp(min=0)
    return float((beyond / there.abs().clamp(min=TINY)).max())
