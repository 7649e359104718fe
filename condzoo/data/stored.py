"""Data sets too large for memory: images are decoded by workers as they are needed.

What a worker does to an image is a function of (seed, epoch, the image's number), so neither the number of
workers nor the number of processes changes a batch.
Shapes: n images of a batch, s pixels a side.
"""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from condzoo.data.augment import alternating_flips, cut_out
from condzoo.data.batches import Batch, BatchPlan, Split, batches_per_epoch, epoch_order, normalizer, ordered_parts
from condzoo.data.holding_out import held_out
from condzoo.data.image_files import ImageError
from condzoo.data.views import View, centre_view, on_cpu, random_view, seeded

MOST_WORKERS = 8
CPU = torch.device("cpu")


@runtime_checkable
class ImageSource(Protocol):
    """The images of a split, read one by one; it must pickle, for the workers."""

    @property
    def labels(self) -> np.ndarray:
        """[n] class numbers."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, and its class."""


@dataclass(frozen=True)
class Part:
    """Some images of a source, by their positions in it."""

    source: ImageSource
    index: np.ndarray  # [n] positions

    @property
    def labels(self) -> np.ndarray:
        """[n] class numbers."""
        return self.source.labels[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, and its class."""
        return self.source.read(int(self.index[index]))


@dataclass(frozen=True)
class StoredData:
    """A data set that is read while it is trained on; see `condzoo.data.DataSet`.

    Attributes:
        view: what the network sees of an image.
        workers: processes that decode, for each process that trains; None: a core each, of those that torchrun's
            processes on this machine share, at most 8.
        device: where batches are put.
        validation: the training images that are held out, where a recipe asks for it.
    """

    name: str
    class_names: tuple[str, ...]
    train: ImageSource
    test: ImageSource
    mean: tuple[float, ...]
    std: tuple[float, ...]
    view: View
    workers: int | None = None
    device: torch.device = field(default=CPU)
    validation: ImageSource | None = None

    @property
    def num_classes(self) -> int:
        """Classes, numbered in the order of their names."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a view."""
        return 3, self.view.size, self.view.size

    def to(self, device: torch.device | str) -> "StoredData":
        """The same data set, giving its batches on a device."""
        return replace(self, device=torch.device(device))

    def size(self, split: Split) -> int:
        """Number of images of a split."""
        return len({"train": self.train, "validation": self.validation or (), "test": self.test}[split])

    def holding_out(self, validation: int | float) -> "StoredData":
        """The same data set, a share or number of its training images held out; see `held_out`."""
        stay, out = held_out(self.train.labels, validation)
        return replace(self, train=Part(self.train, stay), validation=Part(self.train, out))

    def train_batches(self, plan: BatchPlan, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Shuffled, augmented, normalized batches of one epoch, from its batch `start` on; see `DataSet`."""
        count = batches_per_epoch(len(self.train), plan.batch_size, plan.drop_last)
        order, size = epoch_order(len(self.train), plan.seed, epoch), plan.batch_size
        mine = [
            slice(batch * size + plan.part, min((batch + 1) * size, len(order)), plan.parts)
            for batch in range(start, count)
        ]
        views = Views(self.train, self.view, plan.augment, plan.seed, epoch)
        loaded = self._loaded(views, [order[part].tolist() for part in mine], plan)
        side = plan.cutout
        if side is None:
            return loaded
        there = order.to(self.device)  # once an epoch: a copy in each step would make the host wait for the GPU
        return (
            (cut_out(images, there[part], side, seed=plan.seed, epoch=epoch), labels)
            for part, (images, labels) in zip(mine, loaded, strict=True)
        )

    def ordered_batches(self, split: Split, plan: BatchPlan) -> Iterator[Batch]:
        """Every image of a split once, in order, not augmented; see `DataSet`."""
        source = self._split(split)
        batches = [list(range(len(source))[mine]) for mine in ordered_parts(len(source), plan)]
        return self._loaded(Views(source, self.view), batches, plan)

    def _split(self, split: Split) -> ImageSource:
        held = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if held is None:
            raise ValueError("no validation images were held out: data.validation says how many")
        return held

    def _loaded(self, views: "Views", batches: list[list[int]], plan: BatchPlan) -> Iterator[Batch]:
        on_gpu = self.device.type == "cuda"
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of one training, as torchrun says
        workers = usual_workers(here) if self.workers is None else self.workers
        loader = DataLoader(
            views,
            batch_sampler=batches,
            num_workers=min(workers, len(batches)),
            pin_memory=on_gpu,
            collate_fn=Stacked(self.view.size),
            generator=torch.Generator(),  # its own: the global one is the training's
            worker_init_fn=functools.partial(outlive_signals, os.getpid()),
        )
        normalize = normalizer(self.mean, self.std, self.device, plan.channels_last)
        current = torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()  # for which memory is pinned
        with signals_held(), on_cpu(), current:  # it seeds its workers by a tensor from its generator
            batches_loaded = iter(loader)
        for loaded in batches_loaded:
            if isinstance(loaded, ImageError):
                raise loaded
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in loaded)
            yield normalize(images), labels


@dataclass(frozen=True)
class Views(Dataset[Any]):
    """What a worker makes of an image: its view and its class, or the error of reading it.

    An error that a worker raised would come back wrapped in its traceback; it is handed over instead.
    """

    source: ImageSource
    view: View
    augment: str | None = None
    seed: int = 0
    epoch: int = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int] | ImageError:
        try:
            image, label = self.source.read(index)
        except ImageError as error:
            return error
        with on_cpu():
            if self.augment is None:
                return centre_view(image, self.view), label
            alternates = self.augment == "alternating"
            flip = bool(alternating_flips(torch.tensor([index]), self.seed, self.epoch)) if alternates else None
            with seeded(self.seed, self.epoch, index):
                return random_view(image, self.view, self.augment, flip), label


@dataclass(frozen=True)
class Stacked:
    """Views as a batch; the first error where there is one. A process's part of a last batch may be empty."""

    size: int

    def __call__(self, views: Sequence[tuple[Tensor, int] | ImageError]) -> tuple[Tensor, Tensor] | ImageError:
        for view in views:
            if isinstance(view, ImageError):
                return view
        pairs = [view for view in views if not isinstance(view, ImageError)]
        labels = torch.tensor([label for _, label in pairs], dtype=torch.int64, device="cpu")
        if not pairs:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8, device="cpu"), labels
        return torch.stack([image for image, _ in pairs]), labels


@dataclass(frozen=True)
class Faults(Dataset[str]):
    """What is wrong with each image of a split; empty where nothing is."""

    source: ImageSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        try:
            self.source.read(index)
        except ImageError as error:
            return str(error)
        return ""


def unreadable_images(data: StoredData) -> Iterator[str]:
    """Decode every image of every split; one line, with its path or place, for each that cannot be read."""
    workers = usual_workers() if data.workers is None else data.workers
    for source in filter(None, (data.train, data.validation, data.test)):
        faults, own = Faults(source), torch.Generator()
        loader = DataLoader(faults, batch_size=64, num_workers=workers, collate_fn=list, generator=own)
        with on_cpu():  # it seeds its workers by a tensor from its generator
            loaded = iter(loader)
        for found in loaded:
            yield from (fault for fault in found if fault)


def usual_workers(processes: int = 1) -> int:
    """A worker a core that this process may use, at most `MOST_WORKERS`; so many processes share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // processes, MOST_WORKERS))


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT wait: a worker that has just been started does not yet outlive them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(trainer: int, worker: int) -> None:
    """Let a worker end when the process that trains says so, not by a signal that asks that process to stop.

    A launcher, a scheduler and Ctrl-C signal whole groups of processes; a training without its workers cannot go on to
    the end of its step and save. Where the system does not say who sent a signal (macOS), SIGTERM stays torch's.

    Args:
        trainer: the process that trains; a worker's parent is another one where a server forks workers (Linux, from
            Python 3.14 on).
        worker: its number, which a DataLoader adds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_by, args=(trainer,), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # `signals_held` is inherited


def end_by(trainer: int) -> None:
    """Wait for the SIGTERM by which Python ends its workers as it exits itself."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
