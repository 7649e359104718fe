"""From a released name or a folder to a network in eval mode."""

import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model
from torch import nn

from condzoo.checkpoints.folder import CONFIG, CONVERSION, METRICS, RECIPE, WEIGHTS, CheckpointFolder, read_folder
from condzoo.checkpoints.records import Config, Conversion, Metrics, read_record
from condzoo.models import create_model, insert_last_bn
from condzoo.models.released import Release, find_release, read_index
from condzoo.models.weight_files import check_state, sha256


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
    """Whether a path is meant: a Path, anything with a separator in it, or what is there."""
    return isinstance(path_or_name, Path) or any(c in path_or_name for c in "/\\") or Path(path_or_name).exists()


def load_folder(folder: CheckpointFolder) -> nn.Module:
    """The network of a folder, its weights compared key by key before anything large is built."""
    config = check_agreement(folder)
    state = folder.weights()
    try:
        with torch.device("meta"):
            expected = build_network(config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder.path / CONFIG} describes no network: {error}") from error
    check_state(state, expected, folder.source(WEIGHTS))
    model = build_network(config)
    model.load_state_dict(state)
    return model.eval()


def build_network(config: Config) -> nn.Module:
    """The network a config describes, with weights of its own."""
    arguments: dict[str, Any] = dict(config.model_args, num_classes=config.num_classes)  # type: ignore[arg-type]
    if "input_size" in arguments:
        arguments["input_size"] = tuple(arguments["input_size"])
    model = create_model(config.architecture, **arguments)
    return insert_last_bn(model) if config.insert_last_bn else model


def check_agreement(folder: CheckpointFolder) -> Config:
    """Check that a folder's files speak of the same network and the same weights.

    Raises:
        ValueError: names the two that disagree.
    """
    config = read_record(folder, CONFIG, Config)
    record: Metrics | Conversion
    if folder.trained:
        record, name = read_record(folder, METRICS, Metrics), METRICS
        trained = read_recipe(folder)["model"]["name"]
        if trained != config.architecture:
            raise ValueError(f"{folder.path}: {RECIPE} trains {trained}, {CONFIG} says {config.architecture}")
    else:
        record, name = read_record(folder, CONVERSION, Conversion), CONVERSION
    for what, here, there in (
        ("the model", config.architecture, record.model),
        ("the tag", config.pretrained_cfg.tag, record.tag),
        ("the number of classes", config.num_classes, config.pretrained_cfg.num_classes),
        ("the SHA-256 of the weights", sha256(folder.files[WEIGHTS]), record.sha256),
    ):
        if here != there:
            raise ValueError(f"{folder.path}: its files disagree on {what}: {here} and, in {name}, {there}")
    return config


def read_recipe(folder: CheckpointFolder) -> dict[str, Any]:
    """recipe.toml as tables; ValueError where it is no recipe of a model."""
    try:
        recipe = tomllib.loads(folder.text(RECIPE))
        json.dumps([recipe["model"]["name"], recipe["data"]["name"], recipe["data"]["batch_size"]])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder.source(RECIPE)} is not a recipe: {type(error).__name__}: {error}") from error
    return recipe
