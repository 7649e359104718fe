"""What must agree across the fields of a recipe, and with the network and the data they name."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from condzoo.data import HUB, data_info, folder_view
from condzoo.data.augment import PADDING
from condzoo.probe.layers import choose
from condzoo.training.data_sets import STORED, class_count, image_shape
from condzoo.training.networks import freeze, network_of
from condzoo.training.recipe_errors import cut_off, shown
from condzoo.training.schema import LARGEST, Constant, DataSection, FullBatch, ModelSection, Recipe, Sgd, Step

FOLLOWS_DATA = ("num_classes", "in_chans", "input_size")
OWN_FIELDS = ("name", "init", "last_bn_init", "drop_rate")
LOADING = ("checkpoint_path", "cache_dir")  # of timm.create_model, as is pretrained*
PLACES = ("hf-hub:", "hf_hub:", "local-dir:")  # as timm names them
IN_MEMORY = ("crop", "resize", "download")
ON_DISK = ("image_size", "eval_resize", "interpolation", "workers", "num_classes")
ON_HUB = ("dataset", *ON_DISK[:-1], "download")
SOME_CLASSES = 10  # to try a network out where only the folders say how many there are


def problems(recipe: Recipe) -> list[str]:
    """One line for each thing in the recipe that cannot work; empty where it can."""
    found = [*_lengths(recipe), *_optimizer(recipe), *_arguments(recipe.model)]
    found += _images(recipe.data)
    return found or list(_network(recipe))


def _lengths(recipe: Recipe) -> Iterator[str]:
    if (recipe.epochs is None) == (recipe.iterations is None):
        got = "neither" if recipe.epochs is None else "both"
        yield f"epochs: got {got} of epochs and iterations, give exactly one"
    schedule = recipe.schedule
    if isinstance(schedule, Step) and any(
        later <= earlier for earlier, later in zip(schedule.milestones, schedule.milestones[1:], strict=False)
    ):
        yield f"schedule.milestones: got {shown(schedule.milestones)}, must be ascending"
    if isinstance(schedule, Step) and schedule.gamma > 1:
        largest = math.log10(recipe.optim.lr) + len(schedule.milestones) * math.log10(schedule.gamma)
        if largest > math.log10(LARGEST):
            yield (
                f"schedule.gamma: got {schedule.gamma:g}, which takes optim.lr beyond {LARGEST:g} in "
                f"{len(schedule.milestones)} milestones; take a smaller one"
            )
    if isinstance(schedule, Constant) and schedule.warmup_epochs and schedule.warmup_iterations:
        yield "schedule.warmup_iterations: got both this and schedule.warmup_epochs, give one"
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
    if isinstance(optim, FullBatch) and recipe.data.cutout is not None:
        yield "data.cutout: got a value with optim.name = 'gd', which takes the images as they are"


def _arguments(model: ModelSection) -> Iterator[str]:
    if model.name.startswith(PLACES):
        yield (
            f"model.name: got {model.name!r}, a place that would be asked for its network whenever the recipe is read; "
            "give the network's name"
        )
    elif "." in model.name:
        arch, _, tag = model.name.partition(".")
        yield (
            f"model.name: got {model.name!r}, and .{cut_off(tag)} names trained weights; a recipe trains from its "
            f"initialization: give {cut_off(arch)!r}"
        )
    for name, value in model.args.items():
        if name in FOLLOWS_DATA:
            yield f"model.args.{name}: follows data.name; leave it out"
        elif name in LOADING or name.startswith("pretrained"):
            yield (
                f"model.args.{name}: loads weights, which as a pickle run code, and a recipe trains from its "
                "initialization; `condzoo convert` makes a checkpoint of a file, and condzoo.create_model loads one"
            )
        elif name in OWN_FIELDS:
            yield f"model.args.{name}: has a field of its own; use model.{name}"
        else:
            yield from (f"model.args.{name}: {fault}" for fault in _no_arguments(value))


def _no_arguments(value: Any) -> Iterator[str]:
    """What in an argument is no number, text or switch, or one that equals not even itself and so no stored recipe."""
    if value is None:
        yield "got None, which TOML has no word for; leave it out"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"got {value}, must be a finite number"
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _no_arguments(entry)
    elif not isinstance(value, bool | int | float | str):
        yield f"got {value}, must be a number, a text, true or false, or a list or table of these"


def _images(data: DataSection) -> Iterator[str]:
    stored = data.name in STORED
    try:
        largest = None if stored else data_info(data.name).size
    except ValueError as error:
        yield f"data.name: {error}"
        return
    own = ON_HUB if data.name == HUB else ON_DISK if stored else IN_MEMORY
    for field in dict.fromkeys([*IN_MEMORY, *ON_DISK, *ON_HUB]):
        value = getattr(data, field)
        if field not in own and value is not None and value is not False:  # workers = 0 is a value
            yield f"data.{field}: is not for data.name = {data.name!r}, which has: {', '.join(own)}"
    if data.validation is not None and data.validation > 1 and data.validation != int(data.validation):
        yield f"data.validation: got {data.validation}, must be a share under 1 or a whole number of images"
    if data.name == HUB and data.dataset is None:
        yield "data.dataset: missing; with data.name = 'hfds' it is a folder, or a name on the Hub"
    view = folder_view(data.image_size, data.eval_resize)
    if stored and view.resize < view.size:
        yield f"data.eval_resize: got {view.resize}, must be at least data.image_size ({view.size})"
    if largest is not None and data.crop is not None and data.crop > largest:
        yield f"data.crop: got {data.crop}, must be at most {largest}, the size of {data.name}"
    side = view.size if stored else data.resize or data.crop or largest
    if side is not None and data.cutout is not None and data.cutout >= side:
        yield f"data.cutout: got {data.cutout}, must be under {side}, the side of an image"
    if side is not None and not stored and data.augment == "paper" and side <= PADDING:
        yield (
            f"data.augment: got 'paper', which reflects {PADDING} pixels at each border and needs images over "
            f"{PADDING} pixels a side, and these have {side}"
        )


class _NetworkFault(Exception):
    """(what is wrong with the network, where)."""


def _network(recipe: Recipe) -> Iterator[str]:
    key = recipe.model.model_dump_json()
    classes = class_count(recipe.data) or SOME_CLASSES
    layers = None if recipe.probe.layers is None else tuple(recipe.probe.layers)
    try:
        _try_out(key, tuple(recipe.freeze), layers, image_shape(recipe.data), classes)
    except _NetworkFault as fault:
        text, path = fault.args
        yield f"{path}: {text}"


@lru_cache(maxsize=256)  # of networks without a fault: one that is raised is not kept, since its code may be mended
def _try_out(
    model_json: str,
    patterns: tuple[str, ...],
    layers: tuple[str, ...] | None,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> None:
    """Raise a _NetworkFault where the network does not work, on the meta device: no memory, no random draw."""
    section = ModelSection.model_validate_json(model_json)
    try:
        with torch.device("meta"):
            model = network_of(section, image_shape, num_classes)
    except Exception as error:  # model.args go to the network's own code: what it raises is a fault of the recipe
        where = "model.name" if repr(section.name) in str(error) else "model"
        raise _NetworkFault(_first_line(error), where) from error
    try:
        freeze(model, patterns)
    except ValueError as error:
        raise _NetworkFault(str(error).removeprefix("freeze: "), "freeze") from error
    if not any(p.requires_grad for p in model.parameters()):
        raise _NetworkFault("every parameter of the network is frozen; nothing is left to train", "freeze")
    try:
        choose(model, layers)
    except ValueError as error:
        raise _NetworkFault(str(error), "probe.layers") from error
    made_for: Any = getattr(model, "pretrained_cfg", {}).get("input_size", ())
    if tuple(made_for[1:]) == image_shape[1:] and not section.args:
        return  # images of the size that it is made for; trying out the deepest takes seconds
    if fault := _forward_fault(model, image_shape, num_classes):
        raise _NetworkFault(fault, "model")


def _forward_fault(model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> str:
    """What is wrong with the network's outputs for such images; shapes alone, on the meta device."""
    images = " x ".join(map(str, image_shape))
    try:
        with torch.no_grad():
            output = model(torch.empty(2, *image_shape, device="meta"))
    except Exception as error:  # as above
        if "meta" in str(error).lower():
            return ""  # a network that looks at values, of which the meta device has none, is not judged
        said = _first_line(error)
        sized = "doesn't match model" in said  # as timm's layers say it that take img_size
        hint = f" Try model.args.img_size = {image_shape[1]}" * sized
        return f"takes no images of {images}: {said}{hint}"
    if isinstance(output, Tensor) and output.shape == (2, num_classes):
        return ""
    got = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    return f"gives {got} for 2 images of {images}, must be [2, {num_classes}]: one number a class"


def _first_line(error: BaseException) -> str:
    """An error in one line; a missing key says little without its kind."""
    kind, lines = type(error).__name__, str(error).splitlines()
    if not lines:
        return kind
    return f"{kind}: {lines[0]}" if isinstance(error, KeyError) else lines[0]
