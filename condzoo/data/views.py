"""What the network sees of an image of any size: a crop, scaled, in training drawn at random.

`none`         scaled to `resize`, then the centre: the view of evaluation.
`standard`     a box of 8 to 100 % of the image and 3/4 to 4/3 as wide as high, scaled, flipped with probability 1/2:
               torchvision's RandomResizedCrop and RandomHorizontalFlip.
`alternating`  the same boxes, flipped in every second epoch; see `condzoo.data.augment`.
`paper`        the same as fb.resnet.torch draws it, which the code of arXiv:2002.10801 trains ImageNet with: aspect
               ratio uniform (torchvision: log-uniform), brightness, contrast and saturation by up to 0.4 in random
               order, PCA lighting by 0.1. As there, colours are not clipped to [0, 255].
Shapes: s pixels a side of a view.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from condzoo.data.augment import AUGMENTATIONS
from condzoo.data.counter_random import derived_seed

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
JITTER, LIGHTING = 0.4, 0.1
GREY = torch.tensor([0.299, 0.587, 0.114], device="cpu").view(3, 1, 1)
# Of ImageNet's colours in [0, 1], from fb.resnet.torch.
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045], device="cpu")
EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], device="cpu"
)

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class View:
    """`size` pixels a side; evaluation scales the shorter side to `resize` before it takes the centre.

    `squash`: it scales both sides to `resize`, as timm's crop_mode of that name does.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    squash: bool = False

    @property
    def mode(self) -> InterpolationMode:
        """As torchvision calls the interpolation."""
        return InterpolationMode(self.interpolation)


@contextlib.contextmanager
def seeded(*counters: int) -> Iterator[None]:
    """Inside, torch's CPU generator is a function of the counters; outside it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(*counters))
        yield


def on_cpu() -> contextlib.AbstractContextManager[object]:
    """Inside, new tensors are on the CPU, those of torch's and torchvision's own functions, too."""
    # Where they are anyway nothing is entered: a context of a device slows every operation.
    return torch.device("cpu") if torch.get_default_device().type != "cpu" else contextlib.nullcontext()


def centre_view(image: Image.Image, view: View) -> Shaped[Tensor, "3 s s"]:
    """The view of evaluation, as bytes."""
    scaled = F.resize(image, [view.resize] * (2 if view.squash else 1), interpolation=view.mode)
    return F.pil_to_tensor(F.center_crop(scaled, [view.size]))


def random_view(image: Image.Image, view: View, augment: str, flip: bool | None = None) -> Shaped[Tensor, "3 s s"]:
    """A view drawn from torch's generator: bytes, or float32 in units of a byte where colours are drawn.

    Args:
        image: RGB.
        view: its size.
        augment: one of `condzoo.data.AUGMENTATIONS`; see above.
        flip: whether the view is flipped; None: drawn.

    Raises:
        ValueError: another augmentation.
    """
    if augment == "none":
        return centre_view(image, view)
    if augment in ("standard", "alternating"):
        box: Box | None = tuple(RandomResizedCrop.get_params(image, list(AREA), list(ASPECT)))  # type: ignore[assignment]
    elif augment == "paper":
        box = uniform_box(image.width, image.height)
    else:
        raise ValueError(f"unknown augmentation {augment!r}; one of: {', '.join(AUGMENTATIONS)}")
    if box is None:  # as fb.resnet.torch does after ten attempts
        scaled = F.resize(image, [view.size], interpolation=view.mode)
        pixels = F.pil_to_tensor(F.center_crop(scaled, [view.size]))
    else:
        pixels = F.pil_to_tensor(F.resized_crop(image, *box, [view.size, view.size], interpolation=view.mode))
    if augment == "paper":
        pixels = lit(jittered(pixels.float()))
    drawn = bool(torch.rand(()) < 0.5)
    return pixels.flip(-1) if (drawn if flip is None else flip) else pixels


def uniform_box(width: int, height: int) -> Box | None:
    """fb.resnet.torch's RandomSizedCrop: area and aspect ratio uniform; None where ten draws do not fit."""
    for _ in range(10):
        area, ratio, swap, top, left = torch.rand(5, dtype=torch.float64).tolist()
        area = (AREA[0] + (AREA[1] - AREA[0]) * area) * width * height
        ratio = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if swap < 0.5:
            w, h = h, w
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    return None


def jittered(pixels: Float32[Tensor, "3 s s"]) -> Float32[Tensor, "3 s s"]:
    """Brightness, contrast and saturation, each by a factor of 1 +- 0.4, in random order."""
    for kind in torch.randperm(3).tolist():
        factor = 1 + JITTER * float(torch.rand(()) * 2 - 1)
        pixels = blended(pixels, kind, factor)
    return pixels


def blended(pixels: Float32[Tensor, "3 s s"], kind: int, factor: float) -> Float32[Tensor, "3 s s"]:
    """factor * pixels + (1 - factor) * what factor 0 leaves: black (0), the mean grey (1), each one's grey (2)."""
    if kind == 0:
        return pixels * factor
    grey = (pixels * GREY).sum(0, keepdim=True)
    if kind == 1:
        # numpy's sum does not depend on torch's number of threads, which differs in workers
        grey = torch.tensor(float(np.mean(grey.numpy(), dtype=np.float64)), dtype=pixels.dtype)
    return pixels * factor + grey * (1 - factor)


def lit(pixels: Float32[Tensor, "3 s s"]) -> Float32[Tensor, "3 s s"]:
    """AlexNet's colour noise: along ImageNet's principal colours, by N(0, 0.1) of each eigenvalue."""
    shift = EIGENVECTORS @ (torch.randn(3) * LIGHTING * EIGENVALUES)
    return pixels + 255 * shift.view(3, 1, 1)
