"""The data set a recipe describes, and what is known of its images before it is read."""

import math
from pathlib import Path

from condzoo.data import HUB, IMAGE_FOLDER, DataSet, StoredData, data_info, folder_view, load_data
from condzoo.training.schema import DataSection, Recipe

STORED = (IMAGE_FOLDER, HUB)


def read_data(recipe: Recipe, data_root: str | Path | None = None, *, test_only: bool = False) -> DataSet:
    """The recipe's data set, on the CPU.

    Args:
        recipe: checked.
        data_root: instead of the recipe's data.root.
        test_only: see `load_data`.
    """
    section = recipe.data
    return load_data(
        section.name,
        data_root or section.root,
        crop=section.crop,
        resize=section.resize,
        download=section.download,
        image_size=section.image_size,
        eval_resize=section.eval_resize,
        interpolation=section.interpolation,
        workers=section.workers,
        num_classes=section.num_classes,
        validation=section.validation,
        dataset=section.dataset,
        test_only=test_only,
    )


def class_names(data: DataSet) -> list[str]:
    """The names of the classes in the order of their numbers, where its files give them; else none."""
    return list(data.class_names) if isinstance(data, StoredData) else []


def renamed(there: list[str], here: list[str]) -> str:
    """The first class that has another name than it had, which makes its number another's; "" where none has."""
    pairs = zip(there, here, strict=True)
    return next((f"class {i} was {was!r} and is {now!r} here" for i, (was, now) in enumerate(pairs) if was != now), "")


def image_shape(section: DataSection) -> tuple[int, int, int]:
    """(channels, height, width) of the images as the network sees them."""
    if section.name in STORED:
        size = folder_view(section.image_size).size
        return 3, size, size
    info = data_info(section.name)
    size = section.resize or section.crop or info.size
    return info.channels, size, size


def class_count(section: DataSection) -> int | None:
    """Number of classes; None where only the folders say."""
    return section.num_classes if section.name in STORED else data_info(section.name).num_classes


def centre_share(section: DataSection) -> float:
    """The share of an image's side that evaluation sees, as timm's crop_pct."""
    if section.name in STORED:
        view = folder_view(section.image_size, section.eval_resize)
        seen, whole = view.size, view.resize
    else:
        whole = data_info(section.name).size
        seen = section.crop or whole
    # timm scales images to floor(size / crop_pct), which is one pixel less where the division rounds down
    size, share = image_shape(section)[1], seen / whole
    return share if math.floor(size / share) == size * whole // seen else math.nextafter(share, 0)
