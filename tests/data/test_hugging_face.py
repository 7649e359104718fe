"""Hugging Face sets from a folder of parquet files, without the network."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from condzoo.data import BatchPlan, StoredData, load_data, unreadable_images
from condzoo.data.image_files import ImageError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
Written = Callable[..., Path]
CLASSES = datasets.ClassLabel(names=["red", "green"])
COLOURS = {0: (250, 10, 10), 1: (10, 250, 10)}


def encoded(colour: tuple[int, int, int], size: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size + 4), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """written(): a folder of parquet files, red images of class `red`, green ones of `green`."""

    def write(
        splits: tuple[str, ...] = ("train", "test"),
        damaged: bool = False,
        columns: tuple[str, str] = ("image", "label"),
        kind: Any = CLASSES,
        several: bool = False,
    ) -> Path:
        image, label_column = columns
        features = datasets.Features({image: datasets.Image(), label_column: kind})
        for split in splits:
            labels = [0, 1] * (4 if split == "train" else 2)
            images = [{"bytes": encoded(COLOURS[label]), "path": None} for label in labels]
            if damaged:
                images[0]["bytes"] = images[0]["bytes"][:40]
            given = [[label] for label in labels] if several else labels
            table = datasets.Dataset.from_dict({image: images, label_column: given}, features=features)
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
    data = load(written(damaged=True))
    with pytest.raises(ImageError, match=r"train\[0\] of \S+ (is no image|cannot be read)"):
        next(data.ordered_batches("train", BatchPlan(4)))
    found = [line.split()[:3] for line in unreadable_images(data.holding_out(2))]
    assert found == [[f"{split}[0]", "of", "set"] for split in ("train", "test")], "of each split the first is damaged"


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ("img", "label")}, r"'\S+' has no column 'image'; it has img, label: rename the one meant \("),
        ({"columns": ("image", "labels")}, r"'\S+' has no column 'label'; it has image, labels: rename the one meant"),
        ({"kind": datasets.Value("int64")}, r"the column 'label' of '\S+' is of kind Value; it must be of ClassLabel"),
        (
            {"kind": datasets.Sequence(CLASSES), "several": True},
            r"the column 'label' of \S+ is of kind \w+; it must be",
        ),
    ],
    ids=["img", "labels", "numbers", "several labels"],
)
def test_other_columns_are_told_before_anything_is_read(changes: Any, message: str, written: Written) -> None:
    with pytest.raises(ValueError, match=r"data\.dataset: " + message):
        load(written(**changes))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["green", "red"], r"class 0 is 'red' in \S+train\S+ and 'green' in \S+test\S+; number one as the other \("),
        (["red"], r"class 1 is 'green' in \S+train\S+ and none in \S+test\S+; number one as the other \("),
    ],
    ids=["another order", "one is missing"],
)
@pytest.mark.parametrize("arrow", [False, True])
def test_splits_that_number_their_classes_differently_are_told(
    names: list[str], message: str, arrow: bool, written: Written
) -> None:
    """`class_encode_column` of each split by itself does it, and `datasets` gives the test labels the first names."""
    folder = written(splits=("train",))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": encoded(COLOURS[0]), "path": None}] * 2
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 0]}, features=features)
    if arrow:
        kept = datasets.Dataset.from_parquet(str(folder / "train-00000-of-00001.parquet"), cache_dir=str(folder / "c"))
        folder = folder.parent / "kept"
        datasets.DatasetDict(train=kept, test=table).save_to_disk(str(folder))
    else:
        table.to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"data\.dataset: the files of \S+ number the classes differently: " + message):
        load(folder)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "string", "large_string", "both", "int64"])
def test_images_may_be_bytes_or_paths_of_files(kind: str, tmp_path: Path) -> None:
    """As programs write parquet files that know no kind `Image`; timm's reader takes them for images."""
    file = tmp_path / "red.png"
    file.write_bytes(encoded(COLOURS[0]))
    values: dict[str, Any] = {"string": str(file), "large_string": str(file), "int64": 3}
    values["both"] = {"bytes": file.read_bytes(), "path": None}
    both = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": both if kind == "both" else datasets.Value(kind), "label": CLASSES})
    for split in ("train", "test"):
        images = [values.get(kind, file.read_bytes())] * 2
        table = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
        table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    if kind == "int64":
        with pytest.raises(ValueError, match=r"the column 'image' of '\S+' is of kind Value; it must be of Image"):
            load(tmp_path / "set")
        return
    image, label = load(tmp_path / "set").train.read(1)
    assert (image.getpixel((0, 0)), label) == (COLOURS[0], 1)


def gated(*_: Any, **__: Any) -> None:
    """As the Hub's library is told of a set that needs permission."""
    try:
        raise FileNotFoundError("Dataset a/b is not cached in None")
    except FileNotFoundError:
        text = "Dataset 'a/b' is a gated dataset on the Hub. Visit the dataset page at https://... to ask for access."
        raise datasets.exceptions.DatasetNotFoundError(text) from None


def failed(*_: Any, **__: Any) -> None:
    """An error that says only that there was one."""
    raise datasets.exceptions.DatasetGenerationError("An error occurred") from ValueError("no such codec")


def uncast(*_: Any, **__: Any) -> None:
    """As of files with other columns than the first."""
    raise ValueError("Couldn't cast\nimg: string\nto\n{'image': Image()}\nbecause column names don't match")


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (gated, r"Dataset 'a/b' is a gated dataset .* to ask for access\.$"),
        (failed, r"no such codec$"),
        (uncast, r"Couldn't cast \.\.\. because column names don't match$"),
    ],
)
def test_what_datasets_says_of_a_set_is_told(
    ends: Callable[..., None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "get_dataset_split_names", ends)
    with pytest.raises(ValueError, match=r"data\.dataset: 'a/b' cannot be read: " + message):
        load_data("hfds", tmp_path, dataset="a/b", download=True)


def test_a_set_with_a_loading_script_is_one_line(written: Written) -> None:
    folder = written()
    (folder / "set.py").write_text("")
    with pytest.raises(ValueError, match=r"data\.dataset: '\S+set' cannot be read: .*scripts? "):
        load(folder)


def test_splits_are_asked_of_the_cache_that_images_are_read_from(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default cache may be empty, and no network there to ask."""
    asked, split_names = [], datasets.get_dataset_split_names

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options.get("cache_dir"))
        return split_names(*arguments, **options)

    monkeypatch.setattr(datasets, "get_dataset_split_names", noted)
    folder = written()
    load(folder)
    assert asked == [str(folder.parent / "cache")]


def test_places_may_begin_with_the_users_home(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    home = written().parent
    monkeypatch.setenv("HOME", str(home))
    assert load_data("hfds", "~/cache", dataset="~/set", image_size=16, workers=0).size("train") == 8
    assert (home / "cache").is_dir()


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.new("I;16", (20, 24)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"not one", r" is no image; replace it"),
        (encoded(COLOURS[0])[:60], r" cannot be read \("),
        (sixteen_bits(), r": its pixels are of mode 'I;16"),
    ],
    ids=["no image", "cut off", "16 bits"],
)
def test_a_damaged_image_on_the_disk_is_named_by_its_path(content: bytes, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(content)
    features = datasets.Features({"image": datasets.Value("string"), "label": CLASSES})
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"image": [str(file)] * 2, "label": [0, 1]}, features=features)
        table.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ImageError, match=rf"{file} \(train\[1\] of \S+\){fault}"):
        load(tmp_path / "set").train.read(1)
