"""Class folders in ImageNet's layout, root/train/CLASS/*.jpg and root/val/CLASS/*.jpg, by torchvision's ImageFolder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from condzoo.data.image_files import read_image
from condzoo.data.stored import StoredData, unreadable_images
from condzoo.data.views import View

FOLDERS = {"train": "train", "test": "val"}
# ImageNet's colours in bytes: torchvision's, timm's and fb.resnet.torch's constants.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class FolderImages:
    """The images of one split: paths under `root` and their classes.

    The paths are held as one array: millions of Python texts would be copied into every worker.
    """

    root: Path
    paths: np.ndarray  # [n] of bytes
    labels: np.ndarray  # [n] int64

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Where an image is."""
        return self.root / os.fsdecode(self.paths[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, and its class; ImageError where it cannot be read."""
        return read_image(self.path(index)), int(self.labels[index])


def load_image_folder(
    root: Path, view: View, workers: int | None = None, num_classes: int | None = None, *, test_only: bool = False
) -> StoredData:
    """The class folders under a root; images are read when they are needed.

    Args:
        root: holds train/ and val/.
        view: what the network sees of an image.
        workers: see `StoredData`.
        num_classes: how many there must be; None: any number.
        test_only: look for the images of val/ only, and leave the split train empty; train/ need not be there.

    Raises:
        FileNotFoundError: no train/ or val/.
        ValueError: an empty class folder, a class of only one split, a file that is no image by its name, a link that
            leads back, another number of classes.
    """
    train_folder, test_folder = (root / folder for folder in FOLDERS.values())
    test, test_classes = scan_split(test_folder)
    if test_only:
        nothing = FolderImages(train_folder, np.array([], dtype=np.bytes_), np.array([], dtype=np.int64))
        train, classes = nothing, class_names(train_folder) or test_classes
    else:
        train, classes = scan_split(train_folder)
    check_classes(root, classes, test_classes, num_classes)
    return StoredData("imagefolder", classes, train, test, MEAN, STD, view, workers)


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the class folders in a folder, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))


def scan_split(folder: Path) -> tuple[FolderImages, tuple[str, ...]]:
    """The images of a folder of class folders, sorted, and the classes' names."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: an imagefolder's root holds {' and '.join(f'{f}/' for f in FOLDERS.values())}, "
            "each with a folder of images for every class; name the root by --data-root or data.root"
        )
    entries = list(os.scandir(folder))
    for entry in entries:
        if not entry.is_dir():
            raise ValueError(f"{entry.path} lies outside a class folder; move it into the folder of its class")
    if not entries:
        raise ValueError(f"{folder} is empty: it must hold a folder of images for every class")
    for place, names, _ in os.walk(folder, onerror=unreadable, followlinks=True):
        for name in names:  # ImageFolder leaves out a folder that it may not read, and says nothing
            check_link(Path(place, name))
    found = ImageFolder(folder, is_valid_file=check_name, allow_empty=True)
    labels = np.array(found.targets, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(found.classes))
    if not counts.all():
        empty = folder / found.classes[int(np.argmin(counts))]
        raise ValueError(f"class folder {empty} holds no image; fill it, or remove it from every split")
    paths = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in found.samples])
    return FolderImages(folder, paths, labels), tuple(found.classes)


def check_link(folder: Path) -> None:
    """See that a folder is no link to one that it lies in, whose images would be taken once for every turn.

    Raises:
        ValueError: it is.
    """
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(target := folder.resolve()):
        raise ValueError(f"{folder} is a link that leads back to {target}, in which it lies; remove it")


def unreadable(error: OSError) -> None:
    """Raise what kept a folder from being read; it names the folder."""
    raise error


def check_name(path: str) -> bool:
    """True for the name of an image file.

    Raises:
        ValueError: another name; a file is never left out in silence.
    """
    if path.lower().endswith(IMG_EXTENSIONS):
        return True
    raise ValueError(f"{path} is no image by its name ({' '.join(IMG_EXTENSIONS)}); remove it")


def check_classes(root: Path, train: tuple[str, ...], test: tuple[str, ...], num_classes: int | None) -> None:
    """ValueError unless both splits have the same classes, as many as expected."""
    here, there = (root / folder for folder in FOLDERS.values())
    for classes, others, holder, lacking in ((train, test, here, there), (test, train, there, here)):
        missing = [name for name in classes if name not in set(others)]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            names = ", ".join(map(repr, missing[:3])) + more
            raise ValueError(
                f"{lacking} has no class folder {names}, which {holder} has; both must hold the same classes"
            )
    if num_classes is not None and len(train) != num_classes:
        raise ValueError(
            f"{here if here.is_dir() else there} holds {len(train)} classes, the recipe's data.num_classes is "
            f"{num_classes}; name the folder that holds those (--data-root), "
            f"or train with {len(train)} or without it (--set data.num_classes=none)"
        )


def check_images(root: str | os.PathLike[str], workers: int | None = None) -> Iterator[str]:
    """Decode every image of every split; one line, with the path, for each that cannot be read.

    Raises:
        FileNotFoundError, ValueError: the folders themselves are at fault, see `load_image_folder`.
    """
    return unreadable_images(load_image_folder(Path(root), View(1, 1), workers))
