"""Image classification sets of Hugging Face `datasets`, read by timm's reader (the extra `condzoo[datasets]`)."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from condzoo.data.image_files import ImageError, read_image
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
        name = f"{self.reader.split}[{index}] of {self.reader.dataset.info.dataset_name}"
        try:
            file, label = self.reader[index]
        except OSError as error:
            raise ImageError(f"{name} cannot be read ({error}); replace it, or remove it") from error
        except (AssertionError, TypeError) as error:  # what timm's reader makes of it
            raise ImageError(f"{name} has neither bytes nor a path; replace it, or remove it") from error
        path = getattr(file, "name", None)  # of a file on the disk; what lies in the parquet file has none
        with file:
            return read_image(file, f"{path} ({name})" if path else name), label


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
        ValueError: not a folder, and no download allowed; no such splits or columns; damaged files; labels that are
            no classes, or other ones in another file.
        ModuleNotFoundError: `datasets` is not installed.
    """
    name = os.path.expanduser(name)
    if not Path(name).is_dir() and not download:
        raise ValueError(f"data.dataset: {name!r} is no folder here; data.download = true asks the Hub for it")
    try:
        import datasets
        from timm.data.readers.reader_hfds import ReaderHfds
    except ImportError as error:
        raise ModuleNotFoundError("data.name = 'hfds' needs the extra: pip install 'condzoo[datasets]'") from error
    root = None if cache is None else str(cache)
    with causes_told(name):
        splits = datasets.get_dataset_split_names(name, cache_dir=root)
    test = next((split for split in TEST_SPLITS if split in splits), None)
    if test is None or "train" not in splits:
        raise ValueError(
            f"data.dataset: {name!r} has the splits {', '.join(splits)}; it needs train and validation or test"
        )
    with causes_told(name):
        features = datasets.load_dataset(name, split="train", cache_dir=root).features
        files = datasets.load_dataset_builder(name, cache_dir=root).config.data_files or {}
    check_columns(name, features)
    check_numbering(name, [Path(file) for split in ("train", test) for file in files.get(split, ())])
    with causes_told(name):
        readers = [ReaderHfds(name, root=root, split=split) for split in ("train", test)]
    classes = tuple(features["label"].names)
    train, held = (HubImages(reader, class_numbers(reader, len(classes))) for reader in readers)
    return StoredData("hfds", classes, train, held, MEAN, STD, view, workers)


def check_columns(name: str, features: Mapping[str, Any]) -> None:
    """See that a set has what timm's reader takes: it makes a column that is not there of nulls.

    Raises:
        ValueError: no column `image` of images, or no column `label` of classes; says which columns there are.
    """
    import datasets

    for column, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        if column not in features:
            raise ValueError(
                f"data.dataset: {name!r} has no column {column!r}; it has {', '.join(features)}: rename the one meant "
                "(Dataset.rename_column), and keep the set as a folder of parquet files (Dataset.to_parquet)"
            )
        read_as_one = column == "image" and holds_files(features[column])
        if not (isinstance(features[column], kind) or read_as_one):
            found = type(features[column]).__name__
            raise ValueError(
                f"data.dataset: the column {column!r} of {name!r} is of kind {found}; it must be of {kind.__name__} "
                "(Dataset.cast_column)"
            )


def check_numbering(name: str, files: Sequence[Path]) -> None:
    """See that all files number the classes alike: `datasets` reads each by the names of the first, and says nothing.

    Of a set on the Hub no files are here, and `Dataset.push_to_hub` sees to it.

    Raises:
        ValueError: two that do not, as where each split's texts were made classes by themselves.
    """
    known = {file: names for file in files if (names := stored_names(file)) is not None}
    for file, names in known.items():
        first = next(iter(known))
        if names != known[first]:
            position = next(i for i, pair in enumerate(zip_longest(known[first], names)) if pair[0] != pair[1])
            here, there = (repr(all_[position]) if position < len(all_) else "none" for all_ in (names, known[first]))
            raise ValueError(
                f"data.dataset: the files of {name!r} number the classes differently: class {position} is {there} in "
                f"{first} and {here} in {file}; number one as the other (Dataset.align_labels_with_mapping), and write "
                "it again"
            )


def stored_names(file: Path) -> list[str] | None:
    """The classes' names that a parquet or arrow file holds beside its columns; None of other files, or of none."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    if file.suffix not in (".parquet", ".arrow") or not file.is_file():
        return None
    if file.suffix == ".parquet":
        schema = pyarrow.parquet.read_schema(file)
    else:
        with pyarrow.ipc.open_stream(file) as stream:
            schema = stream.schema
    label = datasets.Features.from_arrow_schema(schema).get("label")
    return list(label.names) if isinstance(label, datasets.ClassLabel) else None


def holds_files(feature: Any) -> bool:
    """Whether a column holds bytes or paths of files, or both, which timm's reader takes for images."""
    if isinstance(feature, dict):
        return not {"bytes", "path"}.isdisjoint(feature)
    return getattr(feature, "dtype", "") in ("binary", "large_binary", "string", "large_string")


def class_numbers(reader: Any, classes: int) -> np.ndarray:
    """The class of every image of a split, [n] int64.

    Raises:
        ValueError: a label that is no class; -1 and null are how `datasets` says that there is none.
    """
    given = list(reader.dataset["label"])
    labels = np.array([-1 if label is None else label for label in given], dtype=np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"data.dataset: {reader.split}[{wrong[0]}] has the label {given[wrong[0]]}, which is no class (so have "
            f"{len(wrong)} images of {len(labels)}); it must be from 0 to {classes - 1}: filter the others out"
        )
    return labels


@contextlib.contextmanager
def causes_told(name: str) -> Iterator[None]:
    """Make of an error of `datasets` one line: what it says, or where it says only that something failed, the cause.

    Raises:
        ValueError: `datasets` could not read the set.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from datasets.inspect import SplitsNotFoundError

    try:
        yield
    except (ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a set with a loading script
        said: BaseException = error
        if isinstance(error, DatasetGenerationError | SplitsNotFoundError):
            while (inner := said.__cause__ or (None if said.__suppress_context__ else said.__context__)) is not None:
                said = inner
        first, *others = (str(said) or type(said).__name__).splitlines()
        # Of what cannot be cast, whole schemas stand between "Couldn't cast" and the reason.
        why = f"{first} ... {others[-1]}" if others else first
        raise ValueError(f"data.dataset: {name!r} cannot be read: {why}") from error
