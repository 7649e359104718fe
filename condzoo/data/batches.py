"""How batches are made of a data set, and what training needs of one.

What batch k of epoch e holds is a function of (seed, e, k), so a run goes on from any batch.
Shapes: n images of a batch, c channels, h x w pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

from condzoo.data.counter_random import derived_seed

Batch = tuple[Tensor, Tensor]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class BatchPlan:
    """How batches are made of a data set.

    Attributes:
        batch_size: images in a global batch, over all processes.
        augment: one of `condzoo.data.AUGMENTATIONS`.
        cutout: pixels a side of the square that is cut out of each training image; None: nothing is. See `cut_out`.
        seed: of the order and the augmentation.
        drop_last: leave the last, incomplete batch of an epoch out.
        channels_last: memory format of the images.
        part, parts: this process takes images part, part + parts, ... of each global batch.
    """

    batch_size: int
    augment: str = "none"
    seed: int = 0
    drop_last: bool = True
    channels_last: bool = False
    part: int = 0
    parts: int = 1
    cutout: int | None = None


@runtime_checkable
class DataSet(Protocol):
    """What training needs of a data set, wherever its images are.

    `mean` and `std` are per channel, in units of a byte (0 to 255).
    """

    @property
    def name(self) -> str:
        """As recipes call it."""

    @property
    def num_classes(self) -> int:
        """Classes, numbered from 0."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Subtracted from the bytes."""

    @property
    def std(self) -> tuple[float, ...]:
        """Divided by."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, as the network sees it."""

    def size(self, split: Split) -> int:
        """Number of images of a split; 0 for a validation split that was not held out."""

    def train_batches(self, plan: BatchPlan, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled, augmented, normalized batches of one epoch, from its batch `start` on.

        Yields:
            (images, labels): [n, c, h, w] float32 and [n] int64, this process's part of each global batch.
        """

    def ordered_batches(self, split: Split, plan: BatchPlan) -> Iterator[Batch]:
        """Every image of a split once, in order, not augmented: for evaluation and full-batch gradients.

        Yields:
            (images, labels): [n, c, h, w] float32 and [n] int64, this process's part of each batch.
        """

    def to(self, device: torch.device | str) -> "DataSet":
        """The same data set, giving its batches on a device."""


def batches_per_epoch(examples: int, batch_size: int, drop_last: bool = True) -> int:
    """Number of batches an epoch.

    Raises:
        ValueError: none, because a single batch is larger than the data set and would be dropped.
    """
    count = examples // batch_size if drop_last else -(-examples // batch_size)
    if count == 0:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {examples} training images and drop_last leaves "
            f"no batch; use at most {examples}, or drop_last = false"
        )
    return count


def epoch_order(examples: int, seed: int, epoch: int) -> Int64[Tensor, "examples"]:
    """The order of the examples in an epoch; drawn on the CPU, so it is the same for every device."""
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(examples, generator=generator, device="cpu")


def ordered_parts(examples: int, plan: BatchPlan) -> Iterator[slice]:
    """This process's part of each batch of images taken in order."""
    for start in range(0, examples, plan.batch_size):
        yield slice(start + plan.part, min(start + plan.batch_size, examples), plan.parts)


def normalizer(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, channels_last: bool = False
) -> Callable[[Tensor], Tensor]:
    """The function (images - mean) / std by channel: bytes [n, c, h, w] -> float32 [n, c, h, w]."""
    shift, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def normalize(images: Shaped[Tensor, "n c h w"]) -> Float32[Tensor, "n c h w"]:
        return images.to(torch.float32, memory_format=memory_format, copy=True).sub_(shift).div_(scale)

    return normalize
