"""Section B's cost, measured: the exact matrix, its layer blocks and its Kronecker factors over N, L and d.

What is timed gives spectra: F whole and F_k by `curvature`, Sigma_x and Sigma_grad_h by `measure`, in float64.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from condzoo.experiments.naive_cost import CLASSES, PIXELS
from condzoo.experiments.schema import GrowthSettings
from condzoo.experiments.stopping import stopping
from condzoo.models import create_model
from condzoo.probe import curvature, measure
from condzoo.training.events import Message, OnEvent


def collect_growth(settings: GrowthSettings, seeds: list[int], on_event: OnEvent | None = None) -> dict[str, Any]:
    """Seconds of each way by seed, one size varied at a time, the others at the base.

    Raises:
        Stopped: on a signal.
    """
    began = time.perf_counter()
    sizes = {"examples": settings.examples, "layers": settings.layers, "widths": settings.widths}
    base = {str(name): value for name, value in settings.base.items()}
    planned = [(seed, name, value) for seed in seeds for name, values in sizes.items() for value in values]
    points: list[dict[str, Any]] = []
    with stopping("sizes") as stop_where_asked:
        for number, (seed, name, value) in enumerate(planned, start=1):
            stop_where_asked()
            if on_event is not None:
                on_event(Message(f"[{number}/{len(planned)}] {name} {value}, seed {seed}"))
            seconds = timed({**base, name: value}, settings.repeats, seed)
            points.append({"seed": seed, "varied": name, **base, name: value, "seconds": seconds})
    return {"points": points, "seconds": time.perf_counter() - began}


def timed(size: dict[str, int], repeats: int, seed: int) -> dict[str, float]:
    """Median seconds of each way for one size, the ways taking turns; the seed draws the network and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed seeds GPUs, too
        name = f"mlp{size['layers']}x{size['widths']}"
        model = create_model(name, input_size=(1, PIXELS, PIXELS), num_classes=CLASSES, init="he").double()
        x = torch.randn(size["examples"], 1, PIXELS, PIXELS, dtype=torch.float64)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _, (way, run) in itertools.product(range(repeats + 1), WAYS.items()):
        began = time.perf_counter()
        run(model, x)
        seconds[way].append(time.perf_counter() - began)
    return {way: statistics.median(values[1:]) for way, values in seconds.items()}  # the first warms up


def whole(model: nn.Module, x: torch.Tensor) -> None:
    """F, all layers at once."""
    curvature(model, x, None, "fisher")


def blocks(model: nn.Module, x: torch.Tensor) -> None:
    """F_k of every layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            curvature(model, x, None, "fisher", name)


def kronecker(model: nn.Module, x: torch.Tensor) -> None:
    """Both factors of every layer, labels from the model."""
    y = torch.zeros(len(x), dtype=torch.int64)
    for layer in measure(model, (x, y), labels="model", precision="float64").values():
        layer.fisher.condition_number(0.5)


WAYS: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {"full": whole, "blocks": blocks, "kronecker": kronecker}
