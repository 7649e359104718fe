"""What must agree across the fields of a recipe, and with the network and the data they name."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from condzoo.data import DataInfo, data_info
from condzoo.training.networks import build_network, freeze
from condzoo.training.schema import FullBatch, ModelSection, Recipe, Sgd, Step

FOLLOWS_DATA = ("num_classes", "in_chans", "input_size")
OWN_FIELDS = ("init", "last_bn_init", "drop_rate")


def problems(recipe: Recipe) -> list[str]:
    """One line for each thing in the recipe that cannot work; empty where it can."""
    found = [*_lengths(recipe), *_optimizer(recipe), *_arguments(recipe.model)]
    try:
        info = data_info(recipe.data.name)
    except ValueError as error:
        return [*found, f"data.name: {error}"]
    found += _images(recipe, info)
    return found or list(_network(recipe, info))


def _lengths(recipe: Recipe) -> Iterator[str]:
    if (recipe.epochs is None) == (recipe.iterations is None):
        got = "neither" if recipe.epochs is None else "both"
        yield f"epochs: got {got} of epochs and iterations, give exactly one"
    schedule = recipe.schedule
    if isinstance(schedule, Step) and any(
        later <= earlier for earlier, later in zip(schedule.milestones, schedule.milestones[1:], strict=False)
    ):
        yield f"schedule.milestones: got {schedule.milestones}, must be ascending"
    if recipe.accumulate > recipe.data.batch_size:
        yield f"accumulate: got {recipe.accumulate}, must be at most data.batch_size ({recipe.data.batch_size})"


def _optimizer(recipe: Recipe) -> Iterator[str]:
    optim = recipe.optim
    if isinstance(optim, Sgd) and optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov: got true, needs optim.momentum above 0"
    if isinstance(optim, FullBatch) and recipe.accumulate > 1:
        yield "accumulate: got a value with optim.name = 'gd', which works in chunks of data.batch_size already"
    if isinstance(optim, FullBatch) and recipe.data.augment != "none":
        yield f"data.augment: got {recipe.data.augment!r}, must be 'none' with optim.name = 'gd'"


def _arguments(model: ModelSection) -> Iterator[str]:
    for name, value in model.args.items():
        if name in FOLLOWS_DATA:
            yield f"model.args.{name}: follows data.name; leave it out"
        elif name in OWN_FIELDS:
            yield f"model.args.{name}: has a field of its own; use model.{name}"
        elif _holds_none(value):
            yield f"model.args.{name}: got None, which TOML has no word for; leave it out"


def _holds_none(value: Any) -> bool:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(_holds_none(entry) for entry in entries)


def _images(recipe: Recipe, info: DataInfo) -> Iterator[str]:
    if recipe.data.crop is not None and recipe.data.crop > info.size:
        yield f"data.crop: got {recipe.data.crop}, must be at most {info.size}, the size of {recipe.data.name}"


def _network(recipe: Recipe, info: DataInfo) -> Iterator[str]:
    size = recipe.data.resize or recipe.data.crop or info.size
    key = recipe.model.model_dump_json()
    fault, path = _build_fault(key, tuple(recipe.freeze), (info.channels, size, size), info.num_classes)
    if fault:
        yield f"{path}: {fault}"


@lru_cache(maxsize=64)
def _build_fault(
    model_json: str, patterns: tuple[str, ...], image_shape: tuple[int, int, int], num_classes: int
) -> tuple[str, str]:
    """(what is wrong with the network, where), tried out on the meta device: no memory, no random draw."""
    section = ModelSection.model_validate_json(model_json)
    try:
        with torch.device("meta"):
            model = build_network(section, image_shape, num_classes)
    except Exception as error:  # model.args go to the network's own code: what it raises is a fault of the recipe
        return _first_line(error), "model.name" if repr(section.name) in str(error) else "model"
    try:
        freeze(model, patterns)
    except ValueError as error:
        return str(error).removeprefix("freeze: "), "freeze"
    return "", ""


def _first_line(error: BaseException) -> Any:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
