"""Error and loss over every image of a split."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condzoo.data import Batch, BatchPlan, DataSet, Split
from condzoo.training.distributed import ALONE, Ranks
from condzoo.training.precision import Numerics

EVALUATION_BATCH = {"cpu": 125, "cuda": 1000}  # images; larger ones fall out of a CPU's caches
MOST_PIXELS = 256 * 224 * 224  # of a batch: a GPU that trains on 224 x 224 pixels may not hold a thousand such images


@dataclass(frozen=True)
class Evaluation:
    """Counts over a split: `loss` is the mean cross-entropy, without label smoothing."""

    correct: int
    total: int
    loss: float

    @property
    def error(self) -> float:
        """Share of the images classified wrongly."""
        return (self.total - self.correct) / self.total

    @property
    def accuracy(self) -> float:
        """Share of the images classified rightly."""
        return self.correct / self.total


def evaluate(
    model: nn.Module, data: DataSet, numerics: Numerics, split: Split = "test", ranks: Ranks = ALONE
) -> Evaluation:
    """Evaluate in eval mode, in the data set's order, every image once; the model's mode is restored.

    Args:
        model: [n, c, h, w] images to [n, classes] logits.
        data: on the model's device.
        numerics: autocast and memory format of the forward pass.
        split: "train", "validation" (where images are held out) or "test".
        ranks: each process takes its part of the images; the counts are over all.

    Raises:
        ValueError, OSError: images that cannot be read, by whichever process.
    """
    plan = BatchPlan(
        images_at_once(data, numerics.device) * ranks.world,
        channels_last=numerics.channels_last,
        part=ranks.rank,
        parts=ranks.world,
    )
    was_training = model.training
    model.eval()
    try:
        sums = ranks.all_do(lambda: _sums(model, data.ordered_batches(split, plan), numerics))
    finally:
        model.train(was_training)
    total = data.size(split)
    loss_sum, correct = ranks.sum_(sums).tolist()
    return Evaluation(int(correct), total, loss_sum / total)


def images_at_once(data: DataSet, device: torch.device) -> int:
    """How many images a process evaluates in one forward pass."""
    _, height, width = data.image_shape
    return max(1, min(EVALUATION_BATCH.get(device.type, 1000), MOST_PIXELS // (height * width)))


@torch.no_grad()
def _sums(model: nn.Module, batches: Iterable[Batch], numerics: Numerics) -> Tensor:
    """(sum of losses, right answers) over batches: float64 [2]."""
    sums = torch.zeros(2, dtype=torch.float64, device=numerics.device)
    for x, y in batches:
        if not len(y):  # of a last batch with fewer images than processes; many networks cannot run on none
            continue
        with numerics.autocast():
            logits = model(x)
        loss = nn.functional.cross_entropy(logits.float(), y, reduction="sum")
        sums += torch.stack([loss.double(), (logits.argmax(1) == y).sum().double()])
    return sums
