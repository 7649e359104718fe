"""The data sets by name, and where their files are looked for.

A data root is a folder in torchvision's own layout (`cifar-10-batches-py/`, `MNIST/raw/`, ...), or for `imagefolder`
the one that holds train/ and val/.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from condzoo.data.arrays import LabelledImages, channel_moments, crop_and_resize
from condzoo.data.batches import DataSet
from condzoo.data.digits import load_digits
from condzoo.data.holding_out import held_out
from condzoo.data.hugging_face import load_hub_data
from condzoo.data.image_folder import load_image_folder
from condzoo.data.memory import ImageData
from condzoo.data.torchvision_sets import load_torchvision
from condzoo.data.views import View

DATA_ROOT_VARIABLE = "CONDZOO_DATA"
IMAGE_FOLDER, HUB = "imagefolder", "hfds"
DEFAULT_SIZE, USUAL_SHARE = 224, 0.875  # ImageNet's: 224 pixels of 256


@dataclass(frozen=True)
class DataInfo:
    """What is known of a data set before it is read.

    `mean` and `std` are the published constants a channel (0 to 255); None: those of the training
    images as they are after cropping and resizing.
    """

    channels: int
    size: int
    num_classes: int = 10
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


# What fits into memory. CIFAR's constants: the authors' code, from fb.resnet.torch.
DATASETS = {
    "digits": DataInfo(channels=1, size=8),
    "mnist": DataInfo(channels=1, size=28),
    "fashion_mnist": DataInfo(channels=1, size=28),
    "cifar10": DataInfo(3, 32, mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7)),
    "cifar100": DataInfo(3, 32, num_classes=100, mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4)),
}


def data_info(name: str) -> DataInfo:
    """The entry of a data set that fits into memory.

    Raises:
        ValueError: an unknown name; the closest is given.
    """
    if name not in DATASETS:
        known = [*DATASETS, IMAGE_FOLDER, HUB]
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown data set {name!r}; {hint}one of: {', '.join(known)}")
    return DATASETS[name]


def data_roots(root: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Where data sets are looked for, in order: what names the folder -> the folder.

    An explicit root stands alone; without one, CONDZOO_DATA where it is set, then the user's cache.
    """
    if root is not None:
        return {"the given data root": Path(os.path.expanduser(root))}
    roots = {}
    if os.environ.get(DATA_ROOT_VARIABLE):
        roots[DATA_ROOT_VARIABLE] = Path(os.path.expanduser(os.environ[DATA_ROOT_VARIABLE]))
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return roots | {"the default": cache / "condzoo" / "data"}


def load_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    crop: int | None = None,
    resize: int | None = None,
    download: bool = False,
    image_size: int | None = None,
    eval_resize: int | None = None,
    interpolation: str | None = None,
    workers: int | None = None,
    num_classes: int | None = None,
    validation: int | float | None = None,
    dataset: str | None = None,
    test_only: bool = False,
) -> DataSet:
    """A data set, ready for training: in memory, or for `imagefolder` and `hfds` on disk.

    Args:
        name: one of `DATASETS`, `imagefolder` or `hfds`.
        root: the data root; None looks in CONDZOO_DATA, then in the user's cache.
        crop, resize: in memory, see `crop_and_resize`; the paper's 12x12 MNIST is crop=20, resize=12.
        download: let torchvision fetch what is missing or damaged into the first data root that holds any of it.
        image_size, eval_resize, interpolation: imagefolder's `condzoo.data.views.View`; see `folder_view`.
        workers, num_classes: see `load_image_folder`.
        dataset: hfds's, see `load_hub_data`; `root` is then its cache.
        validation: share or number of training images to hold out as the split "validation"; see `held_out`.
        test_only: the split "test" is all that is wanted: an imagefolder's train/ need not be there.

    Raises:
        ValueError: an unknown name, a wrong size, no `dataset` for hfds, or damaged files (with their path).
        FileNotFoundError: not found; says where it looked and how to get it.
    """
    if name in (IMAGE_FOLDER, HUB):
        view = folder_view(image_size, eval_resize, interpolation)
        if name == HUB:
            cache = None if root is None else Path(os.path.expanduser(root))
            if not dataset:
                raise ValueError(
                    "data set 'hfds': which one is missing; a recipe says it in data.dataset, as a folder or a name on "
                    "the Hub (a run that was trained on it knows it)"
                )
            data = load_hub_data(dataset, view, cache, workers, download)
        else:
            data = load_image_folder(folder_root(data_roots(root)), view, workers, num_classes, test_only=test_only)
        return data if validation is None or test_only else data.holding_out(validation)
    return load_into_memory(name, root, crop=crop, resize=resize, download=download, validation=validation)


def load_into_memory(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    crop: int | None = None,
    resize: int | None = None,
    download: bool = False,
    validation: int | float | None = None,
) -> ImageData:
    """One of `DATASETS`; see `load_data`."""
    info = data_info(name)
    train, test = load_digits() if name == "digits" else load_torchvision(name, data_roots(root), download)
    train, test = (LabelledImages(crop_and_resize(split.images, crop, resize), split.labels) for split in (train, test))
    rest = None
    if validation is not None:
        stay, out = (torch.from_numpy(index) for index in held_out(train.labels.numpy(), validation))
        train, rest = (LabelledImages(train.images[index], train.labels[index]) for index in (stay, out))
    mean, std = (info.mean, info.std) if info.mean and info.std else channel_moments(train.images)
    return ImageData(name, info.num_classes, train, test, mean, std, rest)


def folder_view(size: int | None = None, resize: int | None = None, interpolation: str | None = None) -> View:
    """The view of an imagefolder: 224 pixels, of a shorter side of size / 0.875, bilinear, where nothing is said."""
    size = size or DEFAULT_SIZE
    return View(size, resize or round(size / USUAL_SHARE), interpolation or "bilinear")


def folder_root(roots: dict[str, Path]) -> Path:
    """The first root that holds train/ or val/; what else it lacks is told when it is read."""
    for root in roots.values():
        if (root / "train").is_dir() or (root / "val").is_dir():
            return root
    looked = ",".join(f" {root} (from {source})" for source, root in roots.items())
    raise FileNotFoundError(
        f"no class folders were found: an imagefolder's root holds train/ and val/, each with a folder of images "
        f"for every class; looked for them in{looked}; name the root by --data-root DIR or data.root"
    )
