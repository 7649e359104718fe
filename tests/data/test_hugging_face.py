"""Hugging Face sets from a folder of parquet files, without the network."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condzoo.data import BatchPlan, StoredData, load_data
from condzoo.data.image_files import ImageError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
Written = Callable[..., Path]
COLOURS = {0: (250, 10, 10), 1: (10, 250, 10)}


def encoded(colour: tuple[int, int, int], size: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size + 4), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """written(): a folder of parquet files, red images of class `red`, green ones of `green`."""

    def write(splits: tuple[str, ...] = ("train", "test"), damaged: bool = False) -> Path:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green"])})
        for split in splits:
            labels = [0, 1] * (4 if split == "train" else 2)
            images = [{"bytes": encoded(COLOURS[label]), "path": None} for label in labels]
            if damaged:
                images[0]["bytes"] = images[0]["bytes"][:40]
            table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
            table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
        return tmp_path / "set"

    (tmp_path / "set").mkdir()
    return write


def load(folder: Path) -> StoredData:
    data = load_data("hfds", folder.parent / "cache", dataset=str(folder), image_size=16, workers=0)
    assert isinstance(data, StoredData)
    return data


def test_images_and_classes(written: Written) -> None:
    data = load(written())
    assert (data.class_names, data.size("train"), data.size("test")) == (("red", "green"), 8, 4)
    x, y = next(data.ordered_batches("test", BatchPlan(4)))
    assert y.tolist() == [0, 1, 0, 1]
    pixels = x * torch.tensor(data.std).view(1, 3, 1, 1) + torch.tensor(data.mean).view(1, 3, 1, 1)
    expected = torch.tensor([COLOURS[label] for label in y.tolist()]).float()
    assert torch.allclose(pixels.mean((2, 3)), expected, atol=0.01)
    held = data.holding_out(2)
    assert held.validation is not None
    assert np.bincount(held.validation.labels).tolist() == [1, 1]


def test_a_damaged_image_is_named(written: Written) -> None:
    with pytest.raises(ImageError, match=r"train\[0\] of \S+ (is no image|cannot be read)"):
        next(load(written(damaged=True)).ordered_batches("train", BatchPlan(4)))


def test_missing_splits_and_folders_are_told(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the splits train; it needs train and validation or test"):
        load(written(splits=("train",)))
    with pytest.raises(ValueError, match=r"data\.dataset: 'nobody/nothing' is no folder here; data\.download = true"):
        load_data("hfds", tmp_path, dataset="nobody/nothing")


def rewritten(folder: Path, split: str, **columns: list[object]) -> Path:
    """The folder, columns of a split changed."""
    file = folder / f"{split}-00000-of-00001.parquet"
    table = parquet.read_table(file)
    for name, values in columns.items():
        position = table.schema.get_field_index(name)
        column = pyarrow.array(values, table.schema.field(name).type)
        table = table.set_column(position, table.schema.field(name), column)
    parquet.write_table(table, file)
    return folder


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, r"test\[1\] of \S+ has neither bytes nor a path; replace it, or remove it"),
        ({"bytes": None, "path": None}, r"test\[1\] of \S+ has neither bytes nor a path"),
        ({"bytes": None, "path": "gone.png"}, r"test\[1\] of \S+ cannot be read \(.*No such file.*gone\.png'\); repl"),
    ],
    ids=["null", "empty", "missing file"],
)
def test_an_image_that_is_not_there_is_one_error_with_its_place(entry: object, message: str, written: Written) -> None:
    there = {"bytes": encoded(COLOURS[0]), "path": None}
    data = load(rewritten(written(), "test", image=[there, entry, there, there]))
    with pytest.raises(ImageError, match=message):
        list(data.ordered_batches("test", BatchPlan(4)))


@pytest.mark.parametrize("label", [-1, None, 2])
def test_labels_that_are_no_classes_are_told_at_once(label: int | None, written: Written) -> None:
    folder = rewritten(written(), "test", label=[0, label, label, 1])
    message = rf"test\[1\] has the label {label}, which is no class \(so have 2 images of 4\); it must be from 0 to 1"
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_truncated_file_is_one_line_with_its_cause(split: str, written: Written) -> None:
    folder = written()
    file = folder / f"{split}-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"data\.dataset: '{folder}' cannot be read: .*[Pp]arquet") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
