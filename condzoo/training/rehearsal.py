"""`condzoo train RECIPE --dry-run`: all parts built, the data read, one step taken, nothing written."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from condzoo.data import IMAGE_FOLDER, StoredData, unreadable_images
from condzoo.data.sources import data_roots, folder_root
from condzoo.probe import Probe
from condzoo.training.data_sets import STORED, read_data
from condzoo.training.diagnosis import check_weights, diagnose
from condzoo.training.distributed import join
from condzoo.training.divergence import NonFinite
from condzoo.training.events import Message, OnEvent
from condzoo.training.loop import forked_random_numbers
from condzoo.training.precision import usual_torch
from condzoo.training.preparation import Training, first_unreadable, join_gradients, prepare, training_steps
from condzoo.training.recipe import check_recipe
from condzoo.training.reports import opened_probe
from condzoo.training.runs import Diverged
from condzoo.training.schema import Recipe
from condzoo.training.steps import StepResult, take_step


@dataclass(frozen=True)
class Rehearsal:
    """What one step came to; `probed` is how many layers the probe measured in it."""

    model: str
    parameters: int
    device: str
    precision: str
    training_images: int
    test_images: int
    steps: int
    loss: float
    grad_norm: float
    seconds: float
    probed: int


@usual_torch()
def rehearse(
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    data_root: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> Rehearsal:
    """Do what `train` does up to and with its first step, probe included, and write nothing.

    Of a set on disk every image is decoded before, which takes as long as reading an epoch; `on_event` is told.

    The first step is slower than others: memory is not yet there, a compiled network is compiled in it. Where the probe
    measures it, a second one is compiled in its place, and its time is counted, too.
    Processes that torchrun started take it together, and decode no more than it needs: for all images the others
    would wait longer than torch lets them.

    Raises:
        RecipeError, ValueError, FileNotFoundError: as `train`.
        Diverged: the first loss, gradient or running statistic is not finite, or a weight after it.
    """
    check_recipe(recipe)
    ranks, own_device = join(device)
    if ranks.world == 1:
        check_every_image(recipe, data_root, on_event)
    elif recipe.data.name in STORED and on_event is not None and ranks.first:
        on_event(Message("not every image is decoded: a dry run without torchrun does it"))
    with forked_random_numbers(own_device, ranks):
        training = join_gradients(ranks.all_do(lambda: prepare(recipe, own_device, data_root, ranks)))
        began = time.perf_counter()
        with opened_probe(training, None, 0) as probe:
            result = first_step(training, probe)
        loss = float(result.loss_sum) / result.images
        return Rehearsal(
            model=recipe.model.name,
            parameters=sum(p.numel() for p in training.model.parameters()),
            device=str(training.numerics.device),
            precision=training.numerics.precision,
            training_images=training.data.size("train"),
            test_images=training.data.size("test"),
            steps=training.total_steps,
            loss=loss,
            grad_norm=float(result.grad_norm),
            seconds=time.perf_counter() - began,
            probed=len(latest(probe)),
        )


def check_every_image(recipe: Recipe, data_root: str | Path | None, on_event: OnEvent | None = None) -> None:
    """Decode what an epoch of a set on disk will: the first step sees a batch of it.

    Raises:
        ValueError: images that cannot be read, each in a line of its own with its path or place.
    """
    data = read_data(recipe, data_root) if recipe.data.name in STORED else None
    if not isinstance(data, StoredData):
        return
    folders = recipe.data.name == IMAGE_FOLDER
    name = folder_root(data_roots(data_root or recipe.data.root)) if folders else recipe.data.dataset
    if on_event is not None:
        on_event(Message(f"decoding every image of {name}; the step comes after"))
    if faults := list(unreadable_images(data)):
        raise ValueError("\n".join(faults))


def first_step(training: Training, probe: Probe | None) -> StepResult:
    """Take the first step, and the second where that is the first one compiled: none is that the probe measures.

    Raises:
        Diverged: its loss, gradient, a running statistic or a weight is not finite; says where that begins.
    """
    compiled_next = training.recipe.compile and probe is not None and training.recipe.probe.every > 1
    end = min(2 if compiled_next else 1, training.total_steps)
    try:
        result, *_ = [take_step(training, batch, probe) for batch in training_steps(training, 0, end)]
        training.guard.check()
        check_weights(training, end)
    except NonFinite as bad:
        training.ranks.all_do(lambda: first_unreadable(training))
        fault = bad.fault or diagnose(training, bad.step)
        raise Diverged(f"diverged: {fault.text}", {}) from bad
    return result


def latest(probe: Probe | None) -> list[str]:
    """The layers of the newest measurement."""
    return [] if probe is None or probe.latest is None else list(probe.latest)
