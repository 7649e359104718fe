"""Training speed of CIFAR ResNet-20, batch 128: condzoo beside the scripts people use now.

    python benchmarks/train.py --data-root DIR [--steps 60] [--rounds 3]

Every contender trains the same network on the same images, data loading, augmentation and logging
included, in turns; printed are medians over the rounds of images/s, and ratios within a round. The first
step of each turn is left out. Without CIFAR-10 in the data root, random images of its shape are used.

- plain: the common script: fp32, torchvision transforms on PIL images, a DataLoader with workers.
- timm: timm's create_loader, its optimizer factory, and the step of its train.py.
- condzoo: `condzoo.train` with precision = "auto"; then its loop's overhead: the share of a step that is
  not forward, backward and update, against the same three on one batch held fixed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from condzoo.data import ImageData, LabelledImages, load_data
from condzoo.models import create_model
from condzoo.training import StepDone, preparation, train
from condzoo.training.preparation import prepare, training_steps
from condzoo.training.recipe import parse_recipe
from condzoo.training.steps import take_step

BATCH = 128
WORKERS = 2
NETWORK = "cifar_resnet20"
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.244, 0.262)
RECIPE: dict[str, Any] = {
    "epochs": 160,
    "model": {"name": NETWORK},
    "data": {"name": "cifar10", "batch_size": BATCH, "augment": "standard"},
    "optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
}


class PilImages(Dataset[Any]):
    """The images as torchvision's CIFAR-10 gives them: one PIL image at a time."""

    def __init__(self, images: LabelledImages, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.pixels = images.images.permute(0, 2, 3, 1).numpy()
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(np.ascontiguousarray(self.pixels[index]))
        return (self.transform(image) if self.transform else image), self.labels[index]


def train_plainly(loader: Iterable[Any], optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> float:
    """Images/s of a plain loop over a loader, from the end of its first step on."""
    model.train()
    began, taken = 0.0, 0
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # logging
        began = began or time.perf_counter()
        taken += 1
        if taken == steps:
            break
    return (taken - 1) * BATCH / (time.perf_counter() - began)


def plain(data: ImageData, steps: int) -> float:
    """The common PyTorch script."""
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    prepared = transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    images = PilImages(data.train, prepared)
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS)
    model = create_model(NETWORK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    return train_plainly(loader, optimizer, model, steps)


def with_timm(data: ImageData, steps: int) -> float:
    """timm's loader (its random resized crop and flip) and optimizer."""
    loader = create_loader(
        PilImages(data.train),
        input_size=(3, 32, 32),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=False,
        color_jitter=0,
        mean=MEAN,
        std=STD,
        num_workers=WORKERS,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    model = create_model(NETWORK)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    return train_plainly(loader, optimizer, model, steps)


def with_condzoo(data: ImageData, steps: int) -> float:
    """`condzoo.train`, whose own evaluation is after the last step."""
    times: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, StepDone):
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        train(parse_recipe(RECIPE), out=folder, max_steps=steps, device="cpu", on_event=note)
    return (steps - 1) * BATCH / (times[-1] - times[0])


def loop_overhead(steps: int) -> float:
    """Share of a step of condzoo's loop that is not forward, backward and update."""
    training = prepare(parse_recipe(RECIPE), torch.device("cpu"))
    batches = training_steps(training, 0, steps + 1)
    ((x, y),) = next(batches).chunks

    def bare() -> None:
        training.optimizer.zero_grad()
        with training.numerics.autocast():
            logits = training.model(x)
        nn.functional.cross_entropy(logits.float(), y).backward()
        training.optimizer.step()

    bare()
    shares = []
    for _ in range(steps):
        began = time.perf_counter()
        bare()
        between = time.perf_counter()
        take_step(training, next(batches))
        shares.append(1 - (between - began) / (time.perf_counter() - between))
    return statistics.median(shares)


def read_images(root: str | None) -> ImageData:
    """CIFAR-10, or as many random images."""
    try:
        return load_data("cifar10", root)
    except FileNotFoundError:
        print("CIFAR-10 is not there: random images of its shape")
    generator = torch.Generator().manual_seed(0)
    train_, test = (
        LabelledImages(
            torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (n,), generator=generator),
        )
        for n in (50_000, 1_000)
    )
    return ImageData("cifar10", 10, train_, test, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=60, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    data = read_images(arguments.data_root)
    few = replace(data, test=LabelledImages(data.test.images[:BATCH], data.test.labels[:BATCH]))
    preparation.read_data = lambda recipe, root=None: few  # the evaluation at the end is not measured
    contenders = {"plain": plain, "timm": with_timm, "condzoo": with_condzoo}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, measure in contenders.items():
            speeds[name].append(measure(data, arguments.steps))
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{NETWORK}, batch {BATCH}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}")
    for name, values in speeds.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds["condzoo"], values, strict=True)]
        ratio = f"condzoo is {statistics.median(ratios):.2f} times as fast" if name != "condzoo" else ""
        print(f"{name:8} {statistics.median(values):7.0f} images/s  {ratio}")
    print(f"overhead of condzoo's loop: {loop_overhead(arguments.steps):.1%} of a step")


if __name__ == "__main__":
    main()
