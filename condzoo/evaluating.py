"""The accuracy of a run, a checkpoint's folder or a released name, measured again."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

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
from condzoo.probe.files import expanded
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
    target = without_origin(target)
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
    return Evaluated(found, recorded_of(checkpoint), doubt_of(checkpoint))


def in_float32(model: nn.Module, images: DataSet, device: str | None) -> Evaluation:
    """Evaluate weights that are no run's."""
    where = resolve_device(device)
    return evaluate(model.to(where), images.to(where), Numerics("fp32", channels_last=False, device=where))


def is_timms(name: str) -> bool:
    """Whether a name is that of a network of timm's, with or without a tag."""
    arch = name.partition(".")[0]
    return timm.is_model(arch) and arch not in list_models()


def timms_again(name: str, data: str, data_root: str | Path | None, device: str | None) -> Evaluated:
    """A trained network of timm's, on images prepared as timm evaluates its weights."""
    images = timms_images(name, data, data_root, test_only=True)
    return Evaluated(in_float32(create_model(name, pretrained=True), images, device), None)


def timms_images(name: str, data: str, data_root: str | Path | None, *, test_only: bool = False) -> DataSet:
    """Images prepared as timm's config of a trained network says; `test_only`: see `prepared_images`.

    Raises:
        ValueError: no such network, or a data set of other images or classes.
    """
    model_info(name)  # says what is wrong with the name
    known = timm.get_pretrained_cfg(current_name(name))
    assert known is not None, "`model_info` has found it"
    fields = known.to_dict()
    # where it says nothing, what is usual for timm
    cfg = InputConfig(**fields | {"tag": str(known.tag)} | resolve_data_config(pretrained_cfg=fields))
    return prepared_images(cfg, data, data_root, name, test_only=test_only)


def without_origin(target: str | Path) -> str | Path:
    """timm/resnet50.a1_in1k, as `convert` calls timm's networks, by the name alone; any other target as it is."""
    known = isinstance(target, str) and target.startswith("timm/") and not Path(target).exists()
    return str(target).removeprefix("timm/") if known else target


def folder_of(target: str | Path) -> Path:
    """The folder that is meant by a path, which may be that of a file in it."""
    path = expanded(target)
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
        check_fit(images, config.pretrained_cfg.input_size, config.num_classes, str(folder.path))
        return images
    if data is None:
        raise ValueError(f"{folder.path} was converted and knows no data set; name one by --data, e.g. --data cifar10")
    return prepared_images(config.pretrained_cfg, data, data_root, str(folder.path), test_only=test_only)


def prepared_images(
    cfg: InputConfig, data: str, data_root: str | Path | None, network: str, *, test_only: bool = False
) -> DataSet:
    """A data set as timm's config of a network wants it: constants, and of class folders scale, crop, interpolation.

    Args:
        cfg: timm's config.
        data, data_root: the data set, and where it is.
        network: what errors call it.
        test_only: see `load_data`; class folders are then seen as timm evaluates the network.

    Raises:
        ValueError: class folders, and a crop_mode that is not known here; images of another size or other classes
            than the network's; as `load_data`.
    """
    if data == IMAGE_FOLDER:
        cfg = as_tested(cfg) if test_only else cfg
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
    check_fit(images, cfg.input_size, cfg.num_classes, network)
    return standardized(images, cfg)


def as_tested(cfg: InputConfig) -> InputConfig:
    """The config with the size and crop of timm's own evaluation, which for many networks are larger."""
    fields = cfg.model_dump()
    described = resolve_data_config(pretrained_cfg=fields, use_test_size=True)
    return InputConfig(**fields | {"input_size": tuple(described["input_size"]), "crop_pct": described["crop_pct"]})


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


def doubt_of(folder: CheckpointFolder) -> str:
    """What may make a checkpoint's evaluation wrong though nothing is; else empty."""
    if folder.trained or read_record(folder, CONVERSION, Conversion).preprocessing_known:
        return ""
    return "how its images were standardized is not known: what is usual was taken (`condzoo convert --mean --std`)"


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
