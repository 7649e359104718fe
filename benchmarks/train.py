"""Training speed of CIFAR ResNet-20, batch 128: condzoo beside the scripts people use now.

    python benchmarks/train.py --data-root DIR [--steps 60] [--rounds 3] [--no-compile] [--overhead]

Every contender trains the same network on the same images for as many steps, data loading, augmentation and
logging included, in turns (A B C A B C ...), each turn in a process of its own; printed are medians over the
rounds of images/s, and of the ratios within a round. The first step of a turn is left out: in it loaders start
their workers. Without CIFAR-10 in the data root, random images of its shape are used.

- plain: the common script: fp32, torchvision transforms on PIL images, a DataLoader with workers.
- timm: timm's create_loader as its train.py calls it, its optimizer factory, and the step of its train.py.
- condzoo: `condzoo.train` with precision = "auto".
- compiled (where there is a C++ compiler): the same with compile = true. It compiles in the first step of a turn,
  which is left out like every other's; the seconds it took are printed, for whoever trains no longer than that.

--overhead trains one whole epoch with condzoo and prints the share of it (evaluation left out, a checkpoint
included) that is not forward pass, loss, backward pass and update.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from condzoo.data import ImageData, LabelledImages, load_data
from condzoo.models import create_model
from condzoo.training import EpochDone, Started, StepDone, loop, preparation, steps, train
from condzoo.training.recipe import parse_recipe

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
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index])
        return (self.transform(image) if self.transform else image), self.labels[index]


def train_plainly(loader: Iterable[Any], optimizer: torch.optim.Optimizer, model: nn.Module, count: int) -> float:
    """Images/s of a plain loop over a loader, from the end of its first step on."""
    criterion = nn.CrossEntropyLoss()
    model.train()
    began, taken, total, correct = 0.0, 0, 0.0, 0
    for x, y in loader:
        optimizer.zero_grad()
        logits = model(x)
        loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        total += loss.item()  # what the scripts show
        correct += int((logits.argmax(1) == y).sum())
        began = began or time.perf_counter()
        taken += 1
        if taken == count:
            break
    return (taken - 1) * BATCH / (time.perf_counter() - began)


def plain(data: ImageData, count: int) -> float:
    """The common PyTorch script."""
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    prepared = transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    images = PilImages(data.train, prepared)
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS)
    model = create_model(NETWORK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    return train_plainly(loader, optimizer, model, count)


def with_timm(data: ImageData, count: int) -> float:
    """timm's loader (its prefetcher, random resized crop and flip; no colour jitter) and optimizer."""
    loader = create_loader(
        PilImages(data.train),
        input_size=(3, 32, 32),
        batch_size=BATCH,
        is_training=True,
        color_jitter=0,
        mean=MEAN,
        std=STD,
        num_workers=WORKERS,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    model = create_model(NETWORK)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    return train_plainly(loader, optimizer, model, count)


def with_condzoo(data: ImageData, count: int, recipe: dict[str, Any] = RECIPE) -> float:
    """`condzoo.train`, whose own evaluation is after the last step."""
    times: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, Started | StepDone):
            times.append(time.perf_counter())

    train_on(data, recipe, note, max_steps=count)
    started, first, last = times[0], times[1], times[-1]
    if recipe.get("compile"):
        print(f"first step, compiled in it: {first - started:.0f} s", file=sys.stderr)
    return (count - 1) * BATCH / (last - first)


def compiled(data: ImageData, count: int) -> float:
    """`condzoo.train` with compile = true."""
    return with_condzoo(data, count, RECIPE | {"compile": True})


def overhead(data: ImageData, count: int) -> float:
    """Share of an epoch, evaluation left out, that is not forward pass, loss, backward pass and update."""
    spent: list[float] = []
    marks: dict[str, float] = {}

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **named)
            spent.append(time.perf_counter() - began)
            return result

        return call

    def note(event: Any) -> None:
        if isinstance(event, Started):
            marks["began"] = time.perf_counter()
        if isinstance(event, EpochDone):
            marks["evaluation"] = event.metrics["test_seconds"]

    def build(*arguments: Any) -> nn.Module:
        model = own_build(*arguments)
        evaluated, trained = model.forward, clocked(model.forward)
        model.forward = lambda x: (trained if model.training else evaluated)(x)
        return model

    def optimizer_of(*arguments: Any, **named: Any) -> torch.optim.Optimizer:
        optimizer = own_optimizer(*arguments, **named)
        optimizer.step = clocked(optimizer.step)  # type: ignore[method-assign]
        return optimizer

    def save(*arguments: Any) -> None:
        own_save(*arguments)
        marks["ended"] = time.perf_counter()

    own_build, own_optimizer, own_save = preparation.network_of, preparation.build_optimizer, loop.save_checkpoint
    preparation.network_of, preparation.build_optimizer, loop.save_checkpoint = build, optimizer_of, save
    steps.mean_loss = clocked(steps.mean_loss)
    torch.Tensor.backward = clocked(torch.Tensor.backward)  # type: ignore[method-assign]
    train_on(data, RECIPE | {"epochs": 1}, note)
    return 1 - sum(spent) / (marks["ended"] - marks["began"] - marks["evaluation"])


def train_on(data: ImageData, recipe: dict[str, Any], note: Callable[[Any], None], **options: Any) -> None:
    """Train with the images already read, and one batch of test images."""
    few = replace(data, test=LabelledImages(data.test.images[:BATCH], data.test.labels[:BATCH]))
    preparation.read_data = lambda recipe, root=None: few
    with tempfile.TemporaryDirectory() as folder:
        train(parse_recipe(recipe), out=folder, device="cpu", on_event=note, **options)


def read_images(root: str | None) -> ImageData:
    """CIFAR-10, or as many random images."""
    try:
        return load_data("cifar10", root)
    except FileNotFoundError:
        print("CIFAR-10 is not there: random images of its shape", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    train_, test = (
        LabelledImages(
            torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (n,), generator=generator),
        )
        for n in (50_000, 1_000)
    )
    return ImageData("cifar10", 10, train_, test, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


Contender = Callable[[ImageData, int], float]
THEIRS: dict[str, Contender] = {"plain": plain, "timm": with_timm}
OURS: dict[str, Contender] = {"condzoo": with_condzoo, "compiled": compiled}
COMPILERS = ("c++", "g++", "clang++")


def take_turn(name: str, arguments: argparse.Namespace) -> float:
    """A contender's number, from a process of its own: none leaves the next one its threads or memory."""
    command = [sys.executable, __file__, "--turn", name, "--steps", str(arguments.steps)]
    command += ["--data-root", arguments.data_root] if arguments.data_root else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def compare(arguments: argparse.Namespace) -> None:
    """Every contender in turns, and a table."""
    ours = [name for name in OURS if name != "compiled" or arguments.compile]
    speeds: dict[str, list[float]] = {name: [] for name in [*THEIRS, *ours]}
    for _ in range(arguments.rounds):
        for name in speeds:
            speeds[name].append(take_turn(name, arguments))
    for name, values in speeds.items():
        each = " ".join(f"{value:.0f}" for value in values)
        print(f"{name:8} {statistics.median(values):5.0f} images/s  ({each})")
    for name in ours:
        for other in THEIRS:
            ratios = [own / theirs for own, theirs in zip(speeds[name], speeds[other], strict=True)]
            median, least, most = statistics.median(ratios), min(ratios), max(ratios)
            print(f"{name} is {median:.2f} times as fast as {other} ({least:.2f} to {most:.2f})")


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--steps", type=int, default=60, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overhead", action="store_true", help="the loop's overhead over an epoch, and no comparison")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=any(map(shutil.which, COMPILERS)),
        help="also condzoo with compile = true",
    )
    parser.add_argument("--turn", choices=[*THEIRS, *OURS, "overhead"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        turn = {**THEIRS, **OURS, "overhead": overhead}[arguments.turn]
        print(json.dumps(turn(read_images(arguments.data_root), arguments.steps)))
        return
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"{NETWORK}, batch {BATCH}, {torch.get_num_threads()} threads, {capability}, {versions}")
    if arguments.overhead:
        print(f"overhead of condzoo's loop: {take_turn('overhead', arguments):.2%} of an epoch")
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
