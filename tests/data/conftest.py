"""Small made-up archives in torchvision's layouts, with their checksums in place of the originals'."""

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from condzoo.data import torchvision_sets

TRAIN, TEST = 20, 10


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, kind: type[CIFAR10], patch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Write a made-up CIFAR; returns its arrays as [n, 3, 32, 32] and labels."""
    rng = np.random.default_rng(0)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    fine = kind is CIFAR100
    arrays: dict[str, list[Any]] = {"train": [], "test": [], "train_labels": [], "test_labels": []}
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        listed = []
        for name, _ in files:
            count = (TRAIN if split == "train" else TEST) // len(files)
            images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = rng.integers(0, 100 if fine else 10, count).tolist()
            key = "fine_labels" if fine else "labels"
            (folder / name).write_bytes(pickle.dumps({"data": images, key: labels}))
            listed.append([name, md5(folder / name)])
            arrays[split].append(images.reshape(-1, 3, 32, 32))
            arrays[f"{split}_labels"] += labels
        patch.setattr(kind, f"{split}_list", listed)
    names = [str(i) for i in range(100 if fine else 10)]
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: names}))
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    joined = {split: np.concatenate(arrays[split]) for split in ("train", "test")}
    return joined | {f"{split}_labels": np.array(arrays[f"{split}_labels"]) for split in ("train", "test")}


def write_idx(root: Path, name: str, patch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Write a made-up MNIST or Fashion-MNIST; returns its arrays as [n, 28, 28] and labels."""
    rng = np.random.default_rng(0)
    folder = root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    folder.mkdir(parents=True)
    arrays, sums = {}, {}
    for split, prefix, count in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        parts = {
            "images-idx3": struct.pack(">IIII", 2051, *images.shape) + images.tobytes(),
            "labels-idx1": struct.pack(">II", 2049, count) + labels.tobytes(),
        }
        for part, content in parts.items():
            path = folder / f"{prefix}-{part}-ubyte"
            path.write_bytes(content)
            sums[path.name] = md5(path)
        arrays |= {split: images, f"{split}_labels": labels}
    patch.setitem(torchvision_sets.IDX_MD5, name, sums)
    return arrays


@pytest.fixture
def make_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, np.ndarray]]:
    """Write a made-up set of a name under tmp_path."""

    def make(name: str) -> dict[str, np.ndarray]:
        if name in ("cifar10", "cifar100"):
            return write_cifar(tmp_path, CIFAR100 if name == "cifar100" else CIFAR10, monkeypatch)
        return write_idx(tmp_path, name, monkeypatch)

    return make
