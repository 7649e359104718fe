"""Labelled images held in memory as bytes, and the crop and resize that recipes ask for.

Shapes: n images, c channels, h x w pixels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class LabelledImages:
    """Images as bytes (0 to 255) and one class number each, in the order of the data set."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "LabelledImages":
        """The same images on a device; no copy where they are there already."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


def crop_and_resize(
    images: UInt8[Tensor, "n c h w"], crop: int | None = None, resize: int | None = None
) -> UInt8[Tensor, "n c h2 w2"]:
    """Centre crop to `crop` x `crop` pixels, then resize to `resize` x `resize` (bilinear, antialiased).

    Raises:
        ValueError: a crop larger than the images, or a size under 1.
    """
    height, width = images.shape[-2:]
    for what, size in (("crop", crop), ("resize", resize)):
        if size is not None and size < 1:
            raise ValueError(f"{what} must be at least 1 pixel, got {size}")
    if crop is not None:
        if crop > min(height, width):
            raise ValueError(f"crop must be at most the image's {height}x{width} pixels, got {crop}")
        images = F.center_crop(images, [crop, crop])
    if resize is not None and images.shape[-2:] != (resize, resize):
        images = F.resize(images, [resize, resize], antialias=True)
    return images.contiguous()


def channel_moments(images: UInt8[Tensor, "n c h w"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all images, in units of a byte.

    Exact: bytes are counted, so the result does not depend on the order of summation.
    """
    values = torch.arange(256, dtype=torch.float64, device="cpu")
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(float(share @ (values - mean) ** 2) ** 0.5)
    return tuple(means), tuple(stds)
