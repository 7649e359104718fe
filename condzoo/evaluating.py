"""The accuracy of a run, a checkpoint's folder or a released name, measured again."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

from condzoo.catalog import list_models, model_info
from condzoo.checkpoints.folder import CONFIG, CONVERSION, METRICS, CheckpointFolder
from condzoo.checkpoints.loading import is_path, load_folder, read_checkpoint, read_recipe, release_by_name
from condzoo.checkpoints.records import Config, Conversion, InputConfig, Metrics, read_record
from condzoo.checkpoints.remeasuring import read_images
from condzoo.data import IMAGE_FOLDER, DataSet, ImageData, StoredData, load_data
from condzoo.models import create_model
from condzoo.models.timm_models import current_name
from condzoo.training import Evaluation, evaluate, evaluate_run, load_run
from condzoo.training.precision import Numerics, resolve_device, usual_torch
from condzoo.training.run_directory import MODEL, RECIPE, SUMMARY

CROP_MODES = ("center", "squash")  # of timm's


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, and the right answers out of so many images that were recorded before; None: none were.

    `note`: what is doubtful about it, empty where nothing is.
    """

    evaluation: Evaluation
    recorded: tuple[int, int] | None
    note: str = ""

    @property
    def as_recorded(self) -> bool | None:
        """Whether both agree to the last image; None where nothing was recorded of these images."""
        return None if self.recorded is None else self.recorded == (self.evaluation.correct, self.evaluation.total)


@usual_torch()
def evaluate_again(
    target: str | Path, data: str | None = None, data_root: str | Path | None = None, device: str | None = None
) -> Evaluated:
    """Measure the accuracy on every test image.

    Args:
        target: a run directory, a checkpoint's folder, a released name ("arch.tag", or "arch"), or the name of a
            trained network of timm's.
        data: the data set of a converted checkpoint, which knows none, or of a network of timm's, for which class
            folders are usual; a run or a release has its own.
        data_root: where the data set is.
        device: as for `condzoo.train`. A run is evaluated in its own arithmetic, a checkpoint in float32.

    Raises:
        ValueError, FileNotFoundError: no such run or checkpoint; no data; a data set that is not the target's.
    """
    folder = folder_of(target)
    of_runs = (folder / SUMMARY).is_file() or any(folder.glob(f"*/{SUMMARY}"))  # shards of a sweep have no summary.json
    if of_runs or ((folder / RECIPE).is_file() and not (folder / CONFIG).is_file()):
        return run_again(folder, data, data_root, device)
    if not is_path(target):
        if is_timms(str(target)):
            return timms_again(str(target), data or IMAGE_FOLDER, data_root, device)
        try:
            release_by_name(str(target))
        except ValueError as error:
            raise ValueError(f"{target} is neither a run directory nor a checkpoint's folder here; {error}") from error
    checkpoint = read_checkpoint(target)
    images = checkpoint_images(checkpoint, data, data_root, test_only=True)
    found = in_float32(load_folder(checkpoint), images, device)
    return Evaluated(found, recorded_of(checkpoint), doubt_of(checkpoint, data))


def in_float32(model: nn.Module, images: DataSet, device: str | None) -> Evaluation:
    """Evaluate weights that are no run's."""
    where = resolve_device(device)
    return evaluate(model.to(where), images.to(where), Numerics("fp32", channels_last=False, device=where))


def is_timms(name: str) -> bool:
    """Whether a name is that of a network of timm's, with or without a tag."""
    arch = name.partition(".")[0]
    return timm.is_model(arch) and arch not in list_models()


def timms_again(name: str, data: str, data_root: str | Path | None, device: str | None) -> Evaluated:
    """A trained network of timm's, on images prepared as its weights were trained for."""
    cfg, images = timms_images(name, data, data_root, test_only=True)
    found = in_float32(create_model(name, pretrained=True), images, device)
    return Evaluated(found, None, other_view(cfg, data))


def timms_images(
    name: str, data: str, data_root: str | Path | None, *, test_only: bool = False
) -> tuple[dict[str, Any], DataSet]:
    """timm's config of a trained network, and images prepared as it says.

    Raises:
        ValueError: no such network, or a data set of other images or classes.
    """
    model_info(name)  # says what is wrong with the name
    known = timm.get_pretrained_cfg(current_name(name))
    assert known is not None, "`model_info` has found it"
    fields = known.to_dict()
    described = resolve_data_config(pretrained_cfg=fields)  # where it says nothing, what is usual for timm
    cfg = InputConfig(tag=str(known.tag), num_classes=known.num_classes, **described)
    images = prepared_images(cfg, data, data_root, test_only=test_only)
    check_fit(images, cfg.input_size, cfg.num_classes, name)
    return fields | described, images


def folder_of(target: str | Path) -> Path:
    """The folder that is meant by a path, which may be that of a file in it."""
    path = Path(target)
    return path.parent if path.name in (MODEL, RECIPE, SUMMARY) else path


def run_again(folder: Path, data: str | None, data_root: str | Path | None, device: str | None) -> Evaluated:
    """A run on its own data set."""
    run = load_run(folder)
    check_same(data, run.recipe.data.name)
    summary = run.summary
    recorded = (summary["test_correct"], summary["test_images"]) if "test_correct" in summary else None
    return Evaluated(evaluate_run(folder, data_root, device), recorded)


def checkpoint_images(
    folder: CheckpointFolder, data: str | None, data_root: str | Path | None, *, test_only: bool = False
) -> DataSet:
    """The images a checkpoint was trained on; of a converted one those of `data`, prepared as its config.json says.

    `test_only`: see `load_data`.

    Raises:
        ValueError: a converted one and no data set, or one of other images or classes.
    """
    config = read_record(folder, CONFIG, Config)
    if folder.trained:
        recipe = read_recipe(folder)
        check_same(data, recipe["data"]["name"])
        images = read_images(recipe, data_root, test_only=test_only)
    elif data is None:
        raise ValueError(f"{folder.path} was converted and knows no data set; name one by --data, e.g. --data cifar10")
    else:
        images = prepared_images(config.pretrained_cfg, data, data_root, test_only=test_only)
    check_fit(images, config.pretrained_cfg.input_size, config.num_classes, str(folder.path))
    return images


def prepared_images(cfg: InputConfig, data: str, data_root: str | Path | None, *, test_only: bool = False) -> DataSet:
    """A data set as timm's config of a network wants it: constants, and of class folders scale, crop, interpolation.

    `test_only`: see `load_data`.

    Raises:
        ValueError: class folders, and a crop_mode that is not known here; as `load_data`.
    """
    if data == IMAGE_FOLDER:
        mode = crop_mode_of(cfg)
        if mode not in CROP_MODES:
            known = " and ".join(CROP_MODES)
            raise ValueError(f"crop_mode: the network's config says {mode!r}; images are prepared by {known} only")
        resize = math.floor(cfg.input_size[1] / cfg.crop_pct)  # as timm's evaluation does it
        images = load_data(
            data,
            data_root,
            image_size=cfg.input_size[1],
            eval_resize=resize,
            interpolation=cfg.interpolation,
            test_only=test_only,
        )
        assert isinstance(images, StoredData), "what class folders are"
        images = replace(images, view=replace(images.view, squash=mode == "squash"))
    else:
        images = load_data(data, data_root)
    return standardized(images, cfg)


def crop_mode_of(cfg: InputConfig) -> str:
    """How evaluation crops; "center" where nothing is said, as for timm."""
    return (cfg.model_extra or {}).get("crop_mode") or "center"


def standardized(images: DataSet, cfg: InputConfig) -> DataSet:
    """The images with the constants of a config.json, in place of their data set's usual ones."""
    assert isinstance(images, ImageData | StoredData), "what `load_data` makes"
    mean, std = (tuple(255 * value for value in values) for values in (cfg.mean, cfg.std))
    return replace(images, mean=mean, std=std)


def check_fit(images: DataSet, size: tuple[int, int, int], classes: int, network: str) -> None:
    """See that a network takes a data set's images and tells its classes apart."""
    if images.image_shape != size:
        raise ValueError(f"data: {images.name} has images of {images.image_shape}, {network} takes {size}")
    if images.num_classes != classes:
        raise ValueError(f"data: {images.name} has {images.num_classes} classes, {network} tells {classes} apart")


def doubt_of(folder: CheckpointFolder, data: str | None) -> str:
    """What may make a checkpoint's evaluation wrong, or another one than expected, though nothing is."""
    if folder.trained:
        return ""
    cfg = read_record(folder, CONFIG, Config).pretrained_cfg
    said = []
    if not read_record(folder, CONVERSION, Conversion).preprocessing_known:
        said.append(
            "how its images were standardized is not known: what is usual was taken (`condzoo convert --mean --std`)"
        )
    return "; ".join([*said, *filter(None, [other_view(cfg.model_dump(), data)])])


def other_view(cfg: dict[str, Any], data: str | None) -> str:
    """That timm's own evaluation has images of another size or crop, where its config says so; else empty."""
    seen = {"input_size": list(cfg["input_size"]), "crop_pct": cfg["crop_pct"]}
    test = {key: cfg[f"test_{key}"] for key in seen if cfg.get(f"test_{key}")}
    test = {key: list(value) if isinstance(value, tuple) else value for key, value in test.items()}
    if data != IMAGE_FOLDER or seen | test == seen:
        return ""
    ours = ", ".join(f"{key} {value}" for key, value in seen.items())
    theirs = ", ".join(f"test_{key} {value}" for key, value in test.items())
    return f"images are seen by {ours}; timm's own evaluation takes {theirs}, where accuracies differ"


def check_same(data: str | None, own: str) -> None:
    """See that a data set that was named is the one that the accuracy was recorded on."""
    if data is not None and data != own:
        raise ValueError(f"data: got {data!r}, it was trained and is evaluated on {own!r}; leave --data out")


def recorded_of(folder: CheckpointFolder) -> tuple[int, int] | None:
    """What metrics.json says."""
    if not folder.trained:
        return None
    metrics = read_record(folder, METRICS, Metrics)
    return metrics.test_correct, metrics.test_images
