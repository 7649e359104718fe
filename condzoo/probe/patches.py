"""The rows of a convolution's input as K-FAC counts them: one patch an output position.

Shapes: n images, c channels, g groups; spatial dimensions are written *hw.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

IMAGES = 1 << 22  # elements of unfolded patches held at a time: 16 MB in float32

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def padded(x: Float[Tensor, "n c *hw"], conv: Convolution) -> Float[Tensor, "n c *padded"]:
    """The input with the convolution's own padding around it, whatever its mode."""
    sides = conv._reversed_padding_repeated_twice  # of nn.Conv*: also right for padding="same"
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, sides, mode=mode) if any(sides) else x


def unfolded(x: Float[Tensor, "n c *hw"], conv: Convolution) -> Iterator[Float[Tensor, "m g d positions"]]:
    """Patches [images, groups, c / g * kernel, output positions], a few images at a time."""
    frame = padded(x, conv)
    sizes = [
        (frame.shape[2 + i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
        for i in range(len(conv.kernel_size))
    ]
    shifts = list(itertools.product(*(range(k) for k in conv.kernel_size)))
    per_image = frame.shape[1] * len(shifts)
    for size in sizes:
        per_image *= size
    step = max(1, IMAGES // max(1, per_image))
    for start in range(0, frame.shape[0], step):
        part = frame[start : start + step]
        views = [part[(slice(None), slice(None), *_window(shift, sizes, conv))] for shift in shifts]
        patch = part.new_empty((part.shape[0], part.shape[1], len(shifts), *sizes))
        for i, view in enumerate(views):
            patch[:, :, i] = view
        yield patch.reshape(part.shape[0], conv.groups, -1, patch[0, 0, 0].numel())


def _window(shift: tuple[int, ...], sizes: list[int], conv: Convolution) -> tuple[slice, ...]:
    starts = [s * d for s, d in zip(shift, conv.dilation, strict=True)]
    return tuple(
        slice(a, a + (n - 1) * stride + 1, stride) for a, n, stride in zip(starts, sizes, conv.stride, strict=True)
    )
