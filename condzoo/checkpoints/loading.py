"""From a released name or a folder to a network in eval mode."""

import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model
from torch import nn

from condzoo.checkpoints.folder import (
    CONDITIONING,
    CONFIG,
    CONVERSION,
    EXPECTED,
    METRICS,
    RECIPE,
    WEIGHTS,
    CheckpointFolder,
    read_folder,
)
from condzoo.checkpoints.records import (
    Config,
    Conversion,
    Expected,
    Metrics,
    SeedResult,
    read_conditioning,
    read_record,
)
from condzoo.checkpoints.remeasuring import logits_difference
from condzoo.models import create_model, insert_last_bn
from condzoo.models.pretrained import SOURCES
from condzoo.models.released import Release, check_released, find_release, read_index, release_folder
from condzoo.models.weight_files import as_saved, check_state, in_float32, sha256

# of the largest logit: what no other CPU's arithmetic moves, reduced matrix products included; `verify` is stricter
OTHER_FUNCTION = 0.05
# share of the test images: a training evaluates in its own precision, a release counts in float32
OTHER_PRECISION = 0.01
FEW_IMAGES = 2  # that may be counted otherwise in any case: under 100 images one is more than that share


def list_checkpoints() -> list[str]:
    """Names of the released checkpoints, as "arch.tag", a model's default first."""
    return list(read_index())


def load_checkpoint(path_or_name: str | Path) -> nn.Module:
    """Load a checkpoint.

    Args:
        path_or_name: a checkpoint's folder (checked against its own SHA256SUMS), or a released name: "arch.tag",
            or "arch" for its default (checked against condzoo's index).

    Returns:
        The network, in eval mode, on the CPU.

    Raises:
        ValueError: an unknown name; files that are damaged, disagree, or do not fit the network.
        FileNotFoundError: no such folder, or a released file that is nowhere.
    """
    if is_path(path_or_name):
        return load_folder(read_folder(Path(path_or_name)))
    return create_model(release_by_name(str(path_or_name)).name, pretrained=True).eval()


def read_checkpoint(path_or_name: str | Path) -> CheckpointFolder:
    """The files of a checkpoint's folder, or of a released name, whose weights are those of condzoo's index.

    Raises:
        ValueError, FileNotFoundError: as `load_checkpoint`.
    """
    if is_path(path_or_name):
        return read_folder(Path(path_or_name))
    release = release_by_name(str(path_or_name))
    folder = read_folder(release_folder(release), linked=True)
    check_released(release, folder.files[WEIGHTS], folder.path / WEIGHTS)
    return folder


def release_by_name(name: str) -> Release:
    """The release that "arch.tag", or "arch" for its default, stands for.

    Raises:
        ValueError: an unknown model (with the closest ones), or one without this release.
    """
    arch, _, tag = name.partition(".")
    if not is_model(arch):
        create_model(arch, pretrained=True)  # says what is wrong with the name
    return find_release(arch, tag)


def is_path(path_or_name: str | Path) -> bool:
    """Whether a path is meant: a Path, anything with a separator in it, or what is there and is no released name.

    A name stands for the release that the index knows, whatever lies in the working directory.
    """
    if isinstance(path_or_name, Path) or any(c in path_or_name for c in "/\\"):
        return True
    names = {name for release in read_index().values() for name in (release.name, release.arch)}
    return path_or_name not in {"", *names} and Path(path_or_name).exists()  # "" would be the working directory


def load_folder(folder: CheckpointFolder) -> nn.Module:
    """The network of a folder, which gives the logits that the folder expects, in torch's default dtype.

    Raises:
        ValueError: files that are damaged, disagree, or do not fit the network.
        MemoryError: there is too little.
    """
    model = load_weights(folder)
    try:
        with in_float32():  # half precision moves logits further than another function's need be
            difference = logits_difference(model, read_record(folder, EXPECTED, Expected))
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            said = f"too little memory to run its network on {EXPECTED}: {str(error).splitlines()[0]}"
            raise MemoryError(f"{folder.path}: {said}") from error
        # oneDNN does not say that it found no memory
        said = f"the network of {CONFIG} takes no images of its input_size, or there is too little memory: {error}"
        raise ValueError(f"{folder.path}: {said}") from error
    if not difference <= OTHER_FUNCTION:
        said = f"with {CONFIG} and {WEIGHTS} the logits are {difference:.1e} of the largest off those of {EXPECTED}"
        raise ValueError(f"{folder.path}: its files disagree on the function: {said}")
    return model.to(torch.get_default_dtype())


def load_weights(folder: CheckpointFolder) -> nn.Module:
    """The network of a folder in float32, its weights compared key by key before anything large is built.

    Raises:
        ValueError: files that are damaged, disagree, or do not fit the network.
    """
    config = check_agreement(folder)
    state = folder.weights()
    try:
        with as_saved():
            network = network_of_config(config)
    except Exception as error:  # timm's and torch's constructors refuse arguments in many ways
        raise ValueError(f"{folder.path / CONFIG} describes no network: {error}") from error
    check_state(state, network.state_dict(), folder.source(WEIGHTS))
    check_size(folder, config, network)
    with in_float32():
        model: Any = network_of_config(config)
    model.load_state_dict(state)
    model.pretrained_cfg = model.default_cfg = described(config)
    return model.eval()


def check_size(folder: CheckpointFolder, config: Config, network: nn.Module) -> None:
    """ValueError where the network has other sizes, images or layers than the files say."""
    record = read_origin(folder)
    counted = sum(p.numel() for p in network.parameters())
    if counted != record.parameters:
        raise ValueError(f"{folder.path}: it is recorded with {record.parameters:,} parameters and has {counted:,}")
    features = getattr(network, "num_features", None)
    if config.num_features not in (None, features):
        raise ValueError(f"{folder.path / CONFIG}: num_features is {config.num_features}, the network has {features}")
    size, own = config.pretrained_cfg.input_size, getattr(network, "input_size", None)  # an MLP knows its own
    if isinstance(own, tuple) and own != size:
        raise ValueError(f"{folder.path / CONFIG}: input_size is {size}, the network takes {own}")
    if folder.trained:  # a converted one has what timm says of its networks
        for field in ("first_conv", "classifier"):
            name = (config.pretrained_cfg.model_extra or {}).get(field)
            if name is not None and name not in [own for own, _ in network.named_modules()]:
                raise ValueError(f"{folder.path / CONFIG}: {field} is {name!r}, a layer that the network does not have")
        check_layers(folder, network)


def check_layers(folder: CheckpointFolder, network: nn.Module) -> None:
    """ValueError where the records of conditioning are not of this network's layers, in number and sizes.

    Each convolution and linear layer must be there, measured or skipped with a reason; other modules may be.
    """
    modules = dict(network.named_modules())
    sized = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)}
    for when, record in read_conditioning(folder).items():
        where = f"{folder.source(CONDITIONING)}: {when} is of another network"
        for name, module in sized.items():
            if name not in record:
                if name not in record.skipped:
                    raise ValueError(f"{where}: it lacks the layer {name!r}")
                continue
            outputs, inputs = module.weight.shape[:2]
            sizes = (inputs * getattr(module, "groups", 1), outputs)
            recorded = (record[name].input.dim, record[name].output_grad.dim)
            if recorded != sizes:
                raise ValueError(f"{where}: of {name!r} it has {recorded} inputs and outputs, the network {sizes}")
        if unknown := [name for name in record if name not in modules]:
            raise ValueError(f"{where}: it has a layer {unknown[0]!r}, the network has none of this name")


def described(config: Config) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a network from a folder: the folder's own, and no place to take weights from."""
    own = config.pretrained_cfg.model_dump()
    kept = {key: value for key, value in own.items() if key not in SOURCES}
    return {**kept, "architecture": config.architecture}


def network_of_config(config: Config) -> nn.Module:
    """The network a config describes, with weights of its own."""
    arguments: dict[str, Any] = dict(config.model_args, num_classes=config.num_classes)  # type: ignore[arg-type]
    if "input_size" in arguments:
        arguments["input_size"] = tuple(arguments["input_size"])
    model = create_model(config.architecture, **arguments)
    return insert_last_bn(model) if config.insert_last_bn else model


def check_agreement(folder: CheckpointFolder) -> Config:
    """Check that a folder's files speak of the same network, the same weights and the same training.

    Raises:
        ValueError: names the two that disagree.
    """
    config, record = read_record(folder, CONFIG, Config), read_origin(folder)
    expected = read_record(folder, EXPECTED, Expected)
    name = METRICS if folder.trained else CONVERSION
    size, classes = config.pretrained_cfg.input_size, config.num_classes
    disagree(folder, CONFIG, name, "the model", config.architecture, record.model)
    disagree(folder, CONFIG, name, "the tag", config.pretrained_cfg.tag, record.tag)
    disagree(folder, CONFIG, CONFIG, "the number of classes", classes, config.pretrained_cfg.num_classes)
    disagree(folder, WEIGHTS, name, "the SHA-256 of the weights", sha256(folder.files[WEIGHTS]), record.sha256)
    disagree(folder, CONFIG, EXPECTED, "the size of an image", size, expected.shape[1:])
    columns = {len(row) for row in expected.logits}
    logits = (len(expected.logits), *columns)
    disagree(folder, CONFIG, EXPECTED, "the shape of the logits", (expected.shape[0], classes), logits)
    if isinstance(record, Metrics):
        check_training(folder, config, record)
    return config


def disagree(folder: CheckpointFolder, file: str, other: str, what: str, here: Any, there: Any) -> None:
    """ValueError where two of the files do not say the same."""
    if here != there:
        raise ValueError(f"{folder.path}: its files disagree on {what}: in {file} {here}, in {other} {there}")


def check_training(folder: CheckpointFolder, config: Config, metrics: Metrics) -> None:
    """Check what a training left: the recipe against config and metrics. `check_layers` has its other records.

    Raises:
        ValueError: as `check_agreement`; arguments beside the number of channels, without which the name alone would
            build another network.
    """
    recipe = read_recipe(folder)
    data, seed = recipe["data"], recipe.get("seed")
    disagree(folder, RECIPE, METRICS, "the model", recipe["model"]["name"], metrics.model)
    disagree(folder, RECIPE, METRICS, "the seed", seed, metrics.released_seed)
    released = check_results(metrics, folder.source(METRICS))
    if "iterations" in recipe:
        disagree(folder, RECIPE, METRICS, "the number of steps", recipe["iterations"], released.steps)
    else:
        disagree(folder, RECIPE, METRICS, "the number of epochs", recipe.get("epochs"), released.epochs)
    for field in ("name", "crop", "resize", "augment", "cutout"):
        disagree(folder, RECIPE, METRICS, f"data.{field}", data.get(field), metrics.data.get(field))
    if config.model_args.keys() - {"in_chans"}:
        raise ValueError(
            f"{folder.path / CONFIG}: model_args = {config.model_args}: a trained one has in_chans at most"
        )


def check_results(metrics: Metrics, source: str) -> SeedResult:
    """The released seed's result.

    Raises:
        ValueError: the seeds' results do not fit together, or not with the images that the weights get right.
    """
    results = {result.seed: result for result in metrics.seeds}
    if metrics.released_seed not in results:
        raise ValueError(f"{source}: seeds lacks the released one, {metrics.released_seed}")
    if len(results) < len(metrics.seeds):
        raise ValueError(f"{source}: two of its seeds are the same")
    released = results[metrics.released_seed]
    correct, images, trained = metrics.test_correct, metrics.test_images, released.test_error
    allowed = max(FEW_IMAGES, OTHER_PRECISION * images)
    if correct > images or trained is None or abs(images - correct - round(trained * images)) > allowed:
        raise ValueError(
            f"{source}: {correct} of {images} test images right is no test error of {trained}, which seed "
            f"{metrics.released_seed} has"
        )
    return released


def read_origin(folder: CheckpointFolder) -> Metrics | Conversion:
    """What says where the weights are from: metrics.json of a trained one, else conversion.json."""
    if folder.trained:
        return read_record(folder, METRICS, Metrics)
    return read_record(folder, CONVERSION, Conversion)


def read_recipe(folder: CheckpointFolder) -> dict[str, Any]:
    """recipe.toml as tables; ValueError where it is no recipe of a model."""
    try:
        recipe = tomllib.loads(folder.text(RECIPE))
        json.dumps([recipe["model"]["name"], recipe["data"]["name"], recipe["data"]["batch_size"]])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder.source(RECIPE)} is not a recipe: {type(error).__name__}: {error}") from error
    return recipe
