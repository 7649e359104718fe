"""Image classification sets of Hugging Face `datasets`, read by timm's reader (the extra `condzoo[datasets]`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from condzoo.data.image_files import read_image
from condzoo.data.image_folder import MEAN, STD
from condzoo.data.stored import StoredData
from condzoo.data.views import View

TEST_SPLITS = ("validation", "val", "test")  # the first that is there


@dataclass(frozen=True)
class HubImages:
    """One split: timm's reader, and the class of every image."""

    reader: Any  # timm.data.readers.ReaderHfds, which knows itself only where `datasets` is installed
    labels: np.ndarray  # [n] int64

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, and its class; ImageError where it cannot be read."""
        file, label = self.reader[index]
        with file:
            return read_image(file, f"{self.reader.split}[{index}] of {self.reader.dataset.info.dataset_name}"), label


def load_hub_data(
    name: str, view: View, cache: Path | None = None, workers: int | None = None, download: bool = False
) -> StoredData:
    """A data set with the columns `image` and `label`: a split `train`, and one of `TEST_SPLITS`.

    Args:
        name: a folder that `datasets` reads (of parquet files, say), or a name on the Hub.
        view: what the network sees of an image.
        cache: where `datasets` keeps what it has read; None: its own cache.
        workers: see `StoredData`.
        download: a name on the Hub may be asked for there.

    Raises:
        ValueError: not a folder, and no download allowed; no such splits; labels that are no classes.
        ImportError: `datasets` is not installed.
    """
    if not Path(name).is_dir() and not download:
        raise ValueError(f"data.dataset: {name!r} is no folder here; data.download = true asks the Hub for it")
    try:
        import datasets
        from timm.data.readers.reader_hfds import ReaderHfds
    except ImportError as error:
        raise ImportError("data.name = 'hfds' needs the extra: pip install 'condzoo[datasets]'") from error
    splits = datasets.get_dataset_split_names(name)
    test = next((split for split in TEST_SPLITS if split in splits), None)
    if test is None or "train" not in splits:
        raise ValueError(
            f"data.dataset: {name!r} has the splits {', '.join(splits)}; it needs train and validation or test"
        )
    root = None if cache is None else str(cache)
    readers = [ReaderHfds(name, root=root, split=split) for split in ("train", test)]
    classes = tuple(str(key) for key, _ in sorted(readers[0].class_to_idx.items(), key=lambda item: item[1]))
    if not classes:
        raise ValueError(f"data.dataset: the column 'label' of {name!r} has no class names; it must be a ClassLabel")
    train, held = (HubImages(reader, np.array(reader.dataset["label"], dtype=np.int64)) for reader in readers)
    return StoredData("hfds", classes, train, held, MEAN, STD, view, workers)
