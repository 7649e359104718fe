"""The accuracy of a run, a checkpoint's folder or a released name, measured again."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from condzoo.checkpoints.folder import CONFIG, CONVERSION, METRICS, CheckpointFolder
from condzoo.checkpoints.loading import is_path, load_folder, read_checkpoint, read_recipe, release_by_name
from condzoo.checkpoints.records import Config, Conversion, InputConfig, Metrics, read_record
from condzoo.checkpoints.remeasuring import read_images
from condzoo.data import IMAGE_FOLDER, DataSet, ImageData, StoredData, load_data
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
        target: a run directory, a checkpoint's folder, or a released name ("arch.tag", or "arch").
        data: the data set of a converted checkpoint, which knows none; a run or a release has its own.
        data_root: where the data set is.
        device: as for `condzoo.train`. A run is evaluated in its own arithmetic, a checkpoint in float32.

    Raises:
        ValueError, FileNotFoundError: no such run or checkpoint; no data; a data set that is not the target's.
    """
    folder = Path(target).parent if Path(target).name in (MODEL, RECIPE, SUMMARY) else Path(target)
    of_runs = (folder / SUMMARY).is_file() or any(folder.glob(f"*/{SUMMARY}"))  # shards of a sweep have no summary.json
    if of_runs or ((folder / RECIPE).is_file() and not (folder / CONFIG).is_file()):
        return run_again(folder, data, data_root, device)
    if not is_path(target):
        try:
            release_by_name(str(target))
        except ValueError as error:
            raise ValueError(f"{target} is neither a run directory nor a checkpoint's folder here; {error}") from error
    checkpoint = read_checkpoint(target)
    model = load_folder(checkpoint)
    where = resolve_device(device)
    images = checkpoint_images(checkpoint, data, data_root, test_only=True).to(where)
    found = evaluate(model.to(where), images, Numerics("fp32", channels_last=False, device=where))
    return Evaluated(found, recorded_of(checkpoint), doubt_of(checkpoint, data))


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
    extra = cfg.model_extra or {}
    seen = {"input_size": list(cfg.input_size), "crop_pct": cfg.crop_pct}
    test = {key: extra[f"test_{key}"] for key in seen if extra.get(f"test_{key}")}
    if data == IMAGE_FOLDER and seen | test != seen:
        ours = ", ".join(f"{key} {value}" for key, value in seen.items())
        theirs = ", ".join(f"test_{key} {value}" for key, value in test.items())
        said.append(f"images are seen by {ours}; timm's own evaluation takes {theirs}, where accuracies differ")
    return "; ".join(said)


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
