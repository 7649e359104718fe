"""Data sets held in memory as bytes, on the device they are trained on: no workers, no state.

Shapes: n images of a batch, c channels, h x w pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condzoo.data.arrays import LabelledImages
from condzoo.data.augment import apply_moves, cut_out, draw_moves
from condzoo.data.batches import Batch, BatchPlan, Split, batches_per_epoch, epoch_order, normalizer, ordered_parts


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training: its splits, and what a network must know about them.

    `mean` and `std` are per channel, in units of a byte (0 to 255), of the training images. `validation` are the
    training images that are held out, where a recipe asks for it.
    """

    name: str
    num_classes: int
    train: LabelledImages
    test: LabelledImages
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: LabelledImages | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data with the images of every split on a device."""
        validation = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)

    def size(self, split: Split) -> int:
        """Number of images of a split."""
        return len({"train": self.train, "validation": self.validation or (), "test": self.test}[split])

    def train_batches(self, plan: BatchPlan, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled, augmented, normalized batches of one epoch, from its batch `start` on; see `DataSet`."""
        count = batches_per_epoch(len(self.train), plan.batch_size, plan.drop_last)
        normalize = self._normalizer(plan)
        order = epoch_order(len(self.train), plan.seed, epoch).to(self.train.labels.device)
        for batch in range(start, count):
            index = order[batch * plan.batch_size : (batch + 1) * plan.batch_size]
            moves = draw_moves(plan.augment, index, seed=plan.seed, epoch=epoch, batch=batch)
            mine = slice(plan.part, None, plan.parts)
            images = self.train.images[index[mine]]
            if moves is not None:
                images = apply_moves(images, moves[mine])
            images = normalize(images)
            if plan.cutout is not None:
                images = cut_out(images, index[mine], plan.cutout, seed=plan.seed, epoch=epoch)
            yield images, self.train.labels[index[mine]]

    def ordered_batches(self, split: Split, plan: BatchPlan) -> Iterator[Batch]:
        """Every image of a split once, in order, not augmented; see `DataSet`."""
        held, normalize = self._split(split), self._normalizer(plan)
        for mine in ordered_parts(len(held), plan):
            yield normalize(held.images[mine]), held.labels[mine]

    def _split(self, split: Split) -> LabelledImages:
        held = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if held is None:
            raise ValueError("no validation images were held out: data.validation says how many")
        return held

    def _normalizer(self, plan: BatchPlan) -> Callable[[Tensor], Tensor]:
        return normalizer(self.mean, self.std, self.train.images.device, plan.channels_last)
