"""Data sets by name: what is read equals the files, and what is missing or damaged says where."""

import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from condzoo.data import DATASETS, data_info, load_data
from tests.data.conftest import md5

MakeSet = Callable[[str], dict[str, np.ndarray]]
ON_DISK = [name for name in DATASETS if name != "digits"]


@pytest.mark.parametrize("name", ON_DISK)
def test_images_and_labels_equal_the_files(name: str, make_set: MakeSet, tmp_path: Path) -> None:
    written = make_set(name)
    data = load_data(name, tmp_path)
    for split, loaded in (("train", data.train), ("test", data.test)):
        images = written[split] if written[split].ndim == 4 else written[split][:, None]
        assert loaded.images.dtype == torch.uint8
        np.testing.assert_array_equal(loaded.images.numpy(), images)
        np.testing.assert_array_equal(loaded.labels.numpy(), written[f"{split}_labels"])
    assert data.num_classes == (100 if name == "cifar100" else 10)
    assert data.image_shape == (DATASETS[name].channels, DATASETS[name].size, DATASETS[name].size)


def test_cifar10_is_normalized_by_the_authors_constants(make_set: MakeSet, tmp_path: Path) -> None:
    make_set("cifar10")
    data = load_data("cifar10", tmp_path)
    assert data.mean == (125.3, 123.0, 113.9)
    assert data.std == (63.0, 62.1, 66.7)


def test_sets_without_published_constants_use_their_prepared_training_images(make_set: MakeSet, tmp_path: Path) -> None:
    make_set("mnist")
    data = load_data("mnist", tmp_path, crop=20, resize=12)
    images = data.train.images.double()
    assert data.mean == pytest.approx((images.mean().item(),), rel=1e-12)
    assert data.std == pytest.approx((images.std(correction=0).item(),), rel=1e-12)


def test_the_papers_mnist_is_the_centre_resized_to_12x12(make_set: MakeSet, tmp_path: Path) -> None:
    written = make_set("mnist")
    data = load_data("mnist", tmp_path, crop=20, resize=12)
    assert data.image_shape == (1, 12, 12)
    centre = torch.from_numpy(written["train"])[:, None, 4:24, 4:24].float()
    by_interpolate = torch.nn.functional.interpolate(centre, size=12, mode="bilinear", antialias=True)
    assert (data.train.images.float() - by_interpolate).abs().max() <= 1  # rounding to bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 29}, r"crop must be at most the image's 28x28 pixels, got 29"),
        ({"crop": 0}, r"crop must be at least 1 pixel, got 0"),
        ({"resize": 0}, r"resize must be at least 1 pixel, got 0"),
    ],
)
def test_impossible_sizes(arguments: dict[str, int], message: str, make_set: MakeSet, tmp_path: Path) -> None:
    make_set("mnist")
    with pytest.raises(ValueError, match=message):
        load_data("mnist", tmp_path, **arguments)


def test_unknown_set_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'cifar01'; did you mean 'cifar10'\? one of: digits, "):
        data_info("cifar01")


@pytest.mark.parametrize("name", ON_DISK)
def test_missing_set_says_where_it_looked_and_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name, tmp_path)
    text = str(caught.value)
    assert f"data set {name!r} was not found" in text
    assert str(tmp_path) in text
    for way in ("--data-root", "CONDZOO_DATA", "download = true", "torchvision"):
        assert way in text


def test_without_a_root_the_variable_and_then_the_cache_are_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_set: MakeSet
) -> None:
    monkeypatch.setenv("CONDZOO_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError) as caught:
        load_data("mnist")
    first, second = tmp_path / "variable/MNIST/raw", tmp_path / "cache/condzoo/data/MNIST/raw"
    assert str(caught.value).index(str(first)) < str(caught.value).index(str(second))
    make_set("mnist")
    second.parent.parent.mkdir(parents=True)
    (tmp_path / "MNIST").rename(second.parent)
    assert len(load_data("mnist").train) == 20


@pytest.mark.parametrize("name", ON_DISK)
def test_a_changed_byte_is_an_error_with_the_files_path(name: str, make_set: MakeSet, tmp_path: Path) -> None:
    make_set(name)
    victim = sorted(p for p in tmp_path.rglob("*") if p.is_file())[-1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"data set '{name}' is damaged: .*{victim.name} has md5") as caught:
        load_data(name, tmp_path)
    assert str(victim) in str(caught.value)


@pytest.mark.parametrize("name", ON_DISK)
def test_a_truncated_file_is_an_error_with_its_path(name: str, make_set: MakeSet, tmp_path: Path) -> None:
    make_set(name)
    victim = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=f"data set '{name}' is damaged: .*{victim.name} has md5 .*; delete .* and fetch"
    ):
        load_data(name, tmp_path)


@pytest.mark.parametrize("name", ON_DISK)
def test_a_missing_file_is_an_error_with_its_path(name: str, make_set: MakeSet, tmp_path: Path) -> None:
    make_set(name)
    victim = sorted(p for p in tmp_path.rglob("*") if p.is_file())[-1]
    victim.unlink()
    with pytest.raises(ValueError, match=f"{victim.name} is missing"):
        load_data(name, tmp_path)


@pytest.fixture
def elsewhere(tmp_path: Path, make_set: MakeSet) -> Path:
    """MNIST's folder, where no data root has it."""
    make_set("mnist")
    return (tmp_path / "MNIST").rename(tmp_path / "elsewhere")


def test_download_goes_through_torchvision_into_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    asked = []

    def download(self: datasets.MNIST) -> None:
        asked.append(self.root)
        elsewhere.rename(Path(self.root) / "MNIST")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    root = tmp_path / "new" / "root"
    assert len(load_data("mnist", root, download=True).test) == 10
    assert asked == [str(root)]


@pytest.mark.real_data
def test_real_cifar10_and_mnist(data_root: Path) -> None:
    cifar, mnist = load_data("cifar10", data_root), load_data("mnist", data_root)
    assert [len(s) for s in (cifar.train, cifar.test, mnist.train, mnist.test)] == [50000, 10000, 60000, 10000]
    assert cifar.train.labels.bincount().tolist() == [5000] * 10
    # Published: CIFAR-10's channel means are 125.3 123.0 113.9; MNIST's mean and std are 0.1307 and 0.3081.
    means = cifar.train.images.double().mean((0, 2, 3)).tolist()
    assert means == pytest.approx([125.3, 123.0, 113.9], abs=0.06)
    assert mnist.mean[0] / 255 == pytest.approx(0.1307, abs=1e-4)
    assert mnist.std[0] / 255 == pytest.approx(0.3081, abs=1e-4)


def test_a_download_that_failed_says_so_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    root = tmp_path / "root"
    asked = []

    def download(self: datasets.MNIST) -> None:
        asked.append(self.root)
        folder = Path(self.root) / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        if len(asked) == 1:
            raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
        for path in (elsewhere / "raw").iterdir():
            path.rename(folder / path.name)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with pytest.raises(OSError, match=r"data set 'mnist' could not be fetched into .*root: Error downloading train"):
        load_data("mnist", root, download=True)
    with pytest.raises(ValueError, match="is missing"):
        load_data("mnist", root)
    assert len(load_data("mnist", root, download=True).test) == 10
    assert len(load_data("mnist", root, download=True).test) == 10
    assert asked == [str(root)] * 2, "what is whole is not fetched again"


def leave_processed(folder: Path) -> None:
    """What torchvision before 0.10 kept beside raw/."""
    (folder / "processed").mkdir(parents=True)
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3)), folder / "processed" / file)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_what_an_old_torchvision_left_is_not_read_in_place_of_what_was_checked(
    name: str, make_set: MakeSet, tmp_path: Path
) -> None:
    written = make_set(name)
    (raw,) = tmp_path.glob("*/raw")
    leave_processed(raw.parent)
    data = load_data(name, tmp_path)
    np.testing.assert_array_equal(data.train.images[:, 0].numpy(), written["train"])
    np.testing.assert_array_equal(data.test.labels.numpy(), written["test_labels"])


def extracted_slowly(elsewhere: Path, began: threading.Event, may_end: threading.Event) -> Callable[..., None]:
    """As torchvision extracts: what is there it takes for whole; each file is written under its last name."""

    def download(self: datasets.MNIST) -> None:
        raw = Path(self.root) / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        if all((raw / path.name).exists() for path in (elsewhere / "raw").iterdir()):
            return
        for path in (elsewhere / "raw").iterdir():
            (raw / path.name).write_bytes(path.read_bytes()[:9])
        began.set()
        may_end.wait(10)
        for path in (elsewhere / "raw").iterdir():
            (raw / path.name).write_bytes(path.read_bytes())

    return download


def test_a_second_run_waits_for_the_first_ones_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    began, may_end = threading.Event(), threading.Event()
    monkeypatch.setattr(datasets.MNIST, "download", extracted_slowly(elsewhere, began, may_end))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load_data, "mnist", tmp_path, download=True)
        assert began.wait(10)
        second = pool.submit(load_data, "mnist", tmp_path, download=True)
        threading.Timer(0.2, may_end.set).start()
        assert [len(run.result(10).train) for run in (first, second)] == [20, 20]


def test_a_file_whose_extraction_was_cut_off_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    may_end = threading.Event()
    may_end.set()
    leave_processed(tmp_path / "MNIST")
    monkeypatch.setattr(datasets.MNIST, "download", extracted_slowly(elsewhere, threading.Event(), may_end))
    load_data("mnist", tmp_path, download=True)
    victim = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    victim.write_bytes(victim.read_bytes()[:9])
    with pytest.raises(ValueError, match=f"{victim} has md5"):
        load_data("mnist", tmp_path)
    assert len(load_data("mnist", tmp_path, download=True).test) == 10


def test_a_whole_set_needs_no_lock_where_it_may_not_be_written_to(make_set: MakeSet, tmp_path: Path) -> None:
    make_set("cifar10")
    load_data("cifar10", tmp_path, download=True)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter:DeprecationWarning")
@pytest.mark.parametrize("content", [None, b"cut off"], ids=["lost", "cut off"])
@pytest.mark.parametrize("kind", [datasets.CIFAR10, datasets.CIFAR100])
def test_cifars_meta_file_is_unpacked_again_from_an_archive_that_is_there(
    kind: type[datasets.CIFAR10],
    content: bytes | None,
    make_set: MakeSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchvision takes a set without it for whole, and fetches nothing; its archive is not fetched again, either."""
    written = make_set(kind.__name__.lower())
    with tarfile.open(tmp_path / kind.filename, "w:gz") as archive:
        archive.add(tmp_path / kind.base_folder, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", md5(tmp_path / kind.filename))
    monkeypatch.setattr(kind, "url", "file:///nowhere")
    meta = tmp_path / kind.base_folder / kind.meta["filename"]
    meta.unlink()
    if content is not None:
        meta.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged: {meta}"):
        load_data(kind.__name__.lower(), tmp_path)
    data = load_data(kind.__name__.lower(), tmp_path, download=True)
    np.testing.assert_array_equal(data.test.labels.numpy(), written["test_labels"])
