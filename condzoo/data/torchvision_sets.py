"""MNIST, Fashion-MNIST and CIFAR read through torchvision, with every file's checksum verified."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, VisionDataset
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from condzoo.data.arrays import LabelledImages

CLASSES: dict[str, type[VisionDataset]] = {
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}

# torchvision checks the archives of these two, not the files it reads; md5 of the originals.
IDX_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def load_torchvision(
    name: str, roots: Mapping[str, Path], download: bool = False
) -> tuple[LabelledImages, LabelledImages]:
    """(train, test) from the first of the roots that holds the set; see `condzoo.data.load_data`."""
    root = next((root for root in roots.values() if (root / _folder(name)).is_dir()), None)
    if root is None and not download:
        raise FileNotFoundError(_not_found(name, roots))
    root = root or next(iter(roots.values()))
    fault = _fault(name, root)
    if fault and download:
        fault = _fetched(name, root)
    if fault:
        raise ValueError(
            f"data set {name!r} is damaged: {fault}; delete {root / _folder(name)} and fetch the set again"
        )
    return _read(name, root, train=True), _read(name, root, train=False)


def _folder(name: str) -> Path:
    """The set's folder under a data root, in torchvision's layout."""
    dataset = CLASSES[name]
    if issubclass(dataset, CIFAR10):
        return Path(dataset.base_folder)
    return Path(dataset.__name__) / "raw"


def _md5s(name: str) -> dict[str, str]:
    """File name -> md5 of every file the set is read from."""
    dataset = CLASSES[name]
    if issubclass(dataset, CIFAR10):
        meta = [dataset.meta["filename"], dataset.meta["md5"]]
        return dict([*dataset.train_list, *dataset.test_list, meta])
    return IDX_MD5[name]


def _fault(name: str, root: Path) -> str | None:
    """The first file that is missing or changed, and how; None where all are as they should be."""
    for file, expected in _md5s(name).items():
        path = root / _folder(name) / file
        if not path.is_file():
            return f"{path} is missing"
        got = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if got != expected:
            return f"{path} has md5 {got}, expected {expected}"
    return None


def _fetched(name: str, root: Path) -> str | None:
    """Download what is missing or changed, in one of the processes that ask for it at once; what is wrong then.

    A file that another process is extracting is not whole until it lets go of the lock; one that was cut off, by a kill
    or a full disk, torchvision takes for whole as long as it is there.

    Raises:
        OSError: the network, the server or the disk; a next call goes on.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if _fault(name, root) is None:
                return None
            for file, expected in _md5s(name).items():
                path = root / _folder(name) / file
                if path.is_file() and not check_integrity(str(path), expected):
                    path.unlink()
            _download(name, root)
            return _fault(name, root)
    except (RuntimeError, OSError) as error:
        raise OSError(f"data set {name!r} could not be fetched into {root}: {error}") from error


def _download(name: str, root: Path) -> None:
    """Let torchvision fetch a set, but for the archives that are there, and unpack it."""
    kind: Any = CLASSES[name]
    if issubclass(kind, CIFAR10):  # its own way unpacks nothing where the meta file alone is missing
        download_and_extract_archive(kind.url, str(root), filename=kind.filename, md5=kind.tgz_md5)
        return
    # Not by its constructor, which fetches nothing where an old version has left processed/*.pt.
    dataset = object.__new__(kind)
    VisionDataset.__init__(dataset, str(root))
    dataset.download()


def _not_found(name: str, roots: Mapping[str, Path]) -> str:
    looked = ", ".join(f"{root / _folder(name)} (from {source})" for source, root in roots.items())
    one_liner = f"from torchvision.datasets import {CLASSES[name].__name__} as D; D('DIR', download=True)"
    return (
        f"data set {name!r} was not found; looked for {looked}; name the folder that holds it by --data-root DIR or "
        f'CONDZOO_DATA=DIR, or fetch it: download = true under [data] in the recipe, or python -c "{one_liner}"'
    )


def _read(name: str, root: Path, train: bool) -> LabelledImages:
    """[n, c, h, w] uint8 and [n] int64, from the files that were checked."""
    dataset = CLASSES[name]
    if issubclass(dataset, CIFAR10):
        held = dataset(str(root), train=train)
        images = torch.from_numpy(held.data).permute(0, 3, 1, 2)  # of [n, h, w, c]
        return LabelledImages(images.contiguous(), torch.tensor(held.targets, dtype=torch.int64, device="cpu"))
    # Not by its constructor, which reads an old version's processed/*.pt in their place.
    prefix = str(root / _folder(name) / ("train" if train else "t10k"))
    images = read_image_file(f"{prefix}-images-idx3-ubyte").unsqueeze(1)  # of [n, h, w]
    return LabelledImages(images.contiguous(), read_label_file(f"{prefix}-labels-idx1-ubyte"))
