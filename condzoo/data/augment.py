"""Augmentation of a whole batch at once, on the device, each draw a function of its counter.

`none`         the images as they are.
`standard`     zero-pad 4, a crop of the old size drawn for each image, flipped with probability 1/2
               (He et al., arXiv:1512.03385, sec. 4.2); zero is the black pixel.
`alternating`  the same crops; an image is flipped in every second epoch, from the first on or from the second, so
               two epochs show each image both ways (airbench, arXiv:2404.00498, sec. 3.6).
`paper`        reflect-pad 4, one crop offset for the whole batch, exactly half of the batch flipped
               (the code of arXiv:2002.10801).
`cut_out` comes on top of any of them. Shapes: n images of a batch, c channels, h x w pixels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64, Shaped
from torch import Tensor

from condzoo.data.counter_random import random_below, random_words

AUGMENTATIONS = ("none", "paper", "standard", "alternating")
PADDING = 4


@dataclass(frozen=True)
class Moves:
    """What is done to each image of a batch: the crop's corner in the padded image, and a flip."""

    top: Int64[Tensor, "n"]
    left: Int64[Tensor, "n"]
    flip: Bool[Tensor, "n"]
    reflect: bool

    def __getitem__(self, part: slice) -> "Moves":
        return Moves(self.top[part], self.left[part], self.flip[part], self.reflect)


def draw_moves(name: str, index: Int64[Tensor, "n"], *, seed: int, epoch: int, batch: int) -> Moves | None:
    """The moves of one global batch, or None for `none`.

    Args:
        name: one of `AUGMENTATIONS`.
        index: the batch's examples, by their number in the data set.
        seed, epoch, batch: counters; `batch` is the batch's number within the epoch.

    Raises:
        ValueError: an unknown name.
    """
    if name == "none":
        return None
    offsets = 2 * PADDING + 1
    if name in ("standard", "alternating"):
        words = random_words(seed, epoch, index)
        alternates = name == "alternating"
        flip = alternating_flips(index, seed, epoch) if alternates else random_below(words, 2, field=2).bool()
        return Moves(random_below(words, offsets, 0), random_below(words, offsets, 1), flip, reflect=False)
    if name == "paper":
        # The batch's own word, from a counter no example has; then one word a place to choose the half.
        place = torch.arange(len(index), device=index.device)
        of_batch = random_words(seed, epoch, torch.full_like(index, -1 - batch))
        rank = random_words(seed, epoch, of_batch + place).argsort().argsort()
        top, left = (random_below(of_batch, offsets, field) for field in (0, 1))
        return Moves(top, left, rank < len(index) // 2, reflect=True)
    raise ValueError(f"unknown augmentation {name!r}; one of: {', '.join(AUGMENTATIONS)}")


def alternating_flips(index: Int64[Tensor, "n"], seed: int, epoch: int) -> Bool[Tensor, "n"]:
    """Whether each image is flipped: drawn for the first epoch, and the other way round in every second one."""
    first = random_below(random_words(seed, 0, index), 2, field=2)
    return (first + epoch) % 2 == 1


def apply_moves(images: Shaped[Tensor, "n c h w"], moves: Moves) -> Shaped[Tensor, "n c h w"]:
    """Pad, crop and flip each image by its moves."""
    height, width = images.shape[-2:]
    padded = _reflect_pad(images) if moves.reflect else torch.nn.functional.pad(images, (PADDING,) * 4)
    # Every crop of every image is a view of the padded batch; one indexing picks a crop an image.
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # [n, c, 9, 9, h, w]
    picked = crops[torch.arange(len(images), device=images.device), :, moves.top, moves.left]
    return torch.where(moves.flip[:, None, None, None], picked.flip(-1), picked)


def cut_out(
    images: Float32[Tensor, "n c h w"], index: Int64[Tensor, "n"], side: int, *, seed: int, epoch: int
) -> Float32[Tensor, "n c h w"]:
    """Set a square in each normalized image to 0, its channel's mean; what of it is outside the image is lost.

    Args:
        images: normalized.
        index: the images' numbers in the data set, which their squares are drawn from.
        side: of the square, in pixels; its centre is any pixel with the same probability.
        seed, epoch: counters.

    Source: DeVries and Taylor, arXiv:1708.04552.
    """
    # Their own words: the fields of the first ones are spent on the moves.
    words = random_words(seed, epoch, random_words(seed, epoch, index))
    row, column = (
        _within(size, random_below(words, size, field), side) for field, size in enumerate(images.shape[-2:])
    )
    square = (row[:, :, None] & column[:, None, :])[:, None]
    return torch.where(square, 0.0, images)  # keeps the memory format, as masked_fill does not


def _within(size: int, centre: Int64[Tensor, "n"], side: int) -> Bool[Tensor, "n size"]:
    """Which of `size` pixels in a line are among the `side` ones around each centre."""
    distance = torch.arange(size, device=centre.device) - centre[:, None] + side // 2
    return (distance >= 0) & (distance < side)


def _reflect_pad(images: Shaped[Tensor, "n c h w"]) -> Shaped[Tensor, "n c h2 w2"]:
    """Reflection without repeating the border pixel, for any dtype (torch's own pads no bytes)."""
    for dim in (2, 3):
        size = images.shape[dim]
        if size <= PADDING:
            raise ValueError(f"reflect padding by {PADDING} needs images over {PADDING} pixels wide, got {size}")
        position = torch.arange(-PADDING, size + PADDING, device=images.device).abs()
        images = images.index_select(dim, (size - 1) - (size - 1 - position).abs())
    return images
