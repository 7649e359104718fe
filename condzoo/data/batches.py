"""Batches for training and evaluation, from images held in memory: no workers, no state.

What batch k of epoch e holds is a function of (seed, e, k), so a run goes on from any batch.
Shapes: n images of a batch, c channels, h x w pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from condzoo.data.arrays import ImageData, LabelledImages
from condzoo.data.augment import apply_moves, draw_moves
from condzoo.data.counter_random import derived_seed

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatchPlan:
    """How batches are made of a data set.

    Attributes:
        batch_size: images in a global batch, over all processes.
        augment: one of `condzoo.data.AUGMENTATIONS`.
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
    return torch.randperm(examples, generator=generator)


def train_batches(data: ImageData, plan: BatchPlan, epoch: int, start: int = 0) -> Iterator[Batch]:
    """Shuffled, augmented, normalized batches of one epoch, from its batch `start` on.

    Yields:
        (images, labels): [n, c, h, w] float32 and [n], this process's part of each global batch.
    """
    count = batches_per_epoch(len(data.train), plan.batch_size, plan.drop_last)
    normalize = normalizer(data, plan.channels_last)
    order = epoch_order(len(data.train), plan.seed, epoch).to(data.train.labels.device)
    for batch in range(start, count):
        index = order[batch * plan.batch_size : (batch + 1) * plan.batch_size]
        moves = draw_moves(plan.augment, index, seed=plan.seed, epoch=epoch, batch=batch)
        mine = slice(plan.part, None, plan.parts)
        images = data.train.images[index[mine]]
        if moves is not None:
            images = apply_moves(images, moves[mine])
        yield normalize(images), data.train.labels[index[mine]]


def ordered_batches(split: LabelledImages, data: ImageData, plan: BatchPlan) -> Iterator[Batch]:
    """Every image of a split once, in order, not augmented: for evaluation and full-batch gradients.

    Yields:
        (images, labels): [n, c, h, w] float32 and [n], this process's part of each batch.
    """
    normalize = normalizer(data, plan.channels_last)
    for start in range(0, len(split), plan.batch_size):
        mine = slice(start + plan.part, min(start + plan.batch_size, len(split)), plan.parts)
        yield normalize(split.images[mine]), split.labels[mine]


def normalizer(data: ImageData, channels_last: bool = False) -> Callable[[Tensor], Tensor]:
    """The function (images - mean) / std by channel: uint8 [n, c, h, w] -> float32 [n, c, h, w]."""
    device = data.train.images.device
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (data.mean, data.std))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def normalize(images: UInt8[Tensor, "n c h w"]) -> Float32[Tensor, "n c h w"]:
        return images.to(torch.float32, memory_format=memory_format).sub_(mean).div_(std)

    return normalize
