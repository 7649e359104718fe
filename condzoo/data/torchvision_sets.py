"""MNIST, Fashion-MNIST and CIFAR read through torchvision, with every file's checksum verified."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, VisionDataset

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
    if download and not _complete(name, root):
        _fetch(name, root)
    _check_files(name, root / _folder(name))
    train, test = (CLASSES[name](str(root), train=train) for train in (True, False))  # type: ignore[call-arg]
    return _labelled(train), _labelled(test)


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


def _complete(name: str, root: Path) -> bool:
    return all((root / _folder(name) / file).is_file() for file in _md5s(name))


def _fetch(name: str, root: Path) -> None:
    """Download what is missing, in one of the processes that ask for it at the same time.

    Raises:
        OSError: the network, the server or the disk; a next call goes on.
    """
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if _complete(name, root):
            return
        try:
            CLASSES[name](str(root), download=True)  # type: ignore[call-arg]
        except (RuntimeError, OSError) as error:
            raise OSError(f"data set {name!r} could not be fetched into {root}: {error}") from error


def _check_files(name: str, folder: Path) -> None:
    """Raise a ValueError that names the first missing or changed file."""
    for file, expected in _md5s(name).items():
        path = folder / file
        fault = "is missing"
        if path.is_file():
            got = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if got == expected:
                continue
            fault = f"has md5 {got}, expected {expected}"
        raise ValueError(f"data set {name!r} is damaged: {path} {fault}; delete {folder} and fetch the set again")


def _not_found(name: str, roots: Mapping[str, Path]) -> str:
    looked = ", ".join(f"{root / _folder(name)} (from {source})" for source, root in roots.items())
    one_liner = f"from torchvision.datasets import {CLASSES[name].__name__} as D; D('DIR', download=True)"
    return (
        f"data set {name!r} was not found; looked for {looked}; name the folder that holds it by --data-root DIR or "
        f'CONDZOO_DATA=DIR, or fetch it: download = true under [data] in the recipe, or python -c "{one_liner}"'
    )


def _labelled(dataset: VisionDataset) -> LabelledImages:
    """[n, c, h, w] uint8 and [n] int64 from torchvision's arrays: [n, h, w] or [n, h, w, c]."""
    images = torch.as_tensor(dataset.data)  # type: ignore[attr-defined]
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(dataset.targets, dtype=torch.int64)  # type: ignore[attr-defined]
    return LabelledImages(images.contiguous(), labels)
