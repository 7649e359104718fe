"""The rows of a convolution's input as K-FAC counts them: one patch an output position.

Shapes: n images, c channels, g groups; spatial dimensions are written *hw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

IMAGES = 1 << 22  # elements of unfolded patches held at a time: 16 MB in float32

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def padded(x: Float[Tensor, "n c *hw"], conv: Convolution) -> Float[Tensor, "n c *padded"]:
    """The input with the convolution's own padding around it, whatever its mode."""
    around = sides(conv)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, around, mode=mode) if any(around) else x


def sides(conv: Convolution) -> list[int]:
    """How much a convolution pads on both sides of each dimension, the last one first, as F.pad takes it.

    Of zeros that is what `padding` says when it is called, which networks that are dilated later set anew.
    """
    if conv.padding_mode != "zeros":
        return list(conv._reversed_padding_repeated_twice)
    if isinstance(conv.padding, str):
        reach = [d * (k - 1) for d, k in zip(every(conv, conv.dilation), conv.kernel_size, strict=True)]
        reach = reach if conv.padding == "same" else [0] * len(reach)
        return [side for total in reversed(reach) for side in (total // 2, total - total // 2)]
    return [side for side in reversed(every(conv, conv.padding)) for _ in range(2)]


def every(conv: Convolution, setting: int | tuple[int, ...]) -> tuple[int, ...]:
    """A convolution's setting for each dimension; set after construction it may be one number for all."""
    numbers = (setting,) if isinstance(setting, int) else tuple(setting)
    return numbers * len(conv.kernel_size) if len(numbers) == 1 else numbers


def unfolded(
    x: Float[Tensor, "n c *hw"], conv: Convolution, rows: int = 1
) -> Iterator[Float[Tensor, "m g d positions"]]:
    """Patches [pieces, groups, c / g * kernel, rows of a piece], a few images at a time.

    Args:
        x: input of the convolution.
        conv: gives kernel, stride, padding and groups.
        rows: images stand side by side in a piece until it has about so many rows; with 1 a piece is an image.
    """
    frame = padded(x, conv)
    sizes = _positions(frame.shape[2:], conv)
    shifts = list(itertools.product(*(range(k) for k in conv.kernel_size)))
    beside = max(1, min(frame.shape[0], rows // max(1, math.prod(sizes))))
    step = max(1, IMAGES // max(1, frame.shape[1] * len(shifts) * math.prod(sizes))) // beside * beside or beside
    for start in range(0, frame.shape[0], step):
        part = frame[start : start + step]
        whole = len(part) // beside * beside
        for images, width in ((part[:whole], beside), (part[whole:], len(part) - whole)):
            if len(images):
                yield _side_by_side(images, width, shifts, sizes, conv)


def padded_inside(module: nn.Module, x: Float[Tensor, "n c *hw"], h: Float[Tensor, "n k *out"]) -> Tensor | None:
    """The input with the padding that a subclass of a convolution adds in its forward, None where it is not known.

    Known are timm's, as TensorFlow's "SAME". The convolution itself then adds none (its `padding` is 0).

    Args:
        module: any layer; what is no convolution pads nothing.
        x, h: its input and output.
    """
    if not isinstance(module, Convolution) or x.ndim != len(module.kernel_size) + 2:
        return x
    if output_size(x, module) == list(h.shape[2:]):
        return x
    from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2dSame
    from timm.layers.padding import pad_same

    if not isinstance(module, (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame)):
        return None
    stride, dilation = every(module, module.stride), every(module, module.dilation)
    return pad_same(x, list(module.kernel_size), list(stride), list(dilation))


def output_size(x: Float[Tensor, "n c *hw"], conv: Convolution) -> list[int]:
    """Output positions along each dimension."""
    around = sides(conv)[::-1]  # the last side of the first dimension first
    return _positions([size + sum(around[2 * d : 2 * d + 2]) for d, size in enumerate(x.shape[2:])], conv)


def _positions(frame: Sequence[int], conv: Convolution) -> list[int]:
    """Output positions along each dimension of a padded map."""
    dilation, stride = every(conv, conv.dilation), every(conv, conv.stride)
    return [
        (size - d * (k - 1) - 1) // step + 1
        for size, d, k, step in zip(frame, dilation, conv.kernel_size, stride, strict=True)
    ]


def _side_by_side(
    images: Tensor, width: int, shifts: list[tuple[int, ...]], sizes: list[int], conv: Convolution
) -> Float[Tensor, "m g d positions"]:
    """Patches with the positions of `width` consecutive images in a row."""
    patch = images.new_empty((len(images) // width, images.shape[1], len(shifts), width, *sizes))
    for i, shift in enumerate(shifts):
        view = images[(slice(None), slice(None), *_window(shift, sizes, conv))]
        patch[:, :, i] = view.unflatten(0, (-1, width)).transpose(1, 2)
    return patch.reshape(len(patch), conv.groups, -1, width * math.prod(sizes))


def _window(shift: tuple[int, ...], sizes: list[int], conv: Convolution) -> tuple[slice, ...]:
    starts = [s * d for s, d in zip(shift, every(conv, conv.dilation), strict=True)]
    steps = every(conv, conv.stride)
    return tuple(slice(a, a + (n - 1) * step + 1, step) for a, n, step in zip(starts, sizes, steps, strict=True))
