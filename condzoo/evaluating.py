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
    images = checkpoint_images(checkpoint, data, data_root).to(where)
    found = evaluate(model.to(where), images, Numerics("fp32", channels_last=False, device=where))
    return Evaluated(found, recorded_of(checkpoint), doubt_of(checkpoint))


def run_again(folder: Path, data: str | None, data_root: str | Path | None, device: str | None) -> Evaluated:
    """A run on its own data set."""
    run = load_run(folder)
    check_same(data, run.recipe.data.name)
    summary = run.summary
    recorded = (summary["test_correct"], summary["test_images"]) if "test_correct" in summary else None
    return Evaluated(evaluate_run(folder, data_root, device), recorded)


def checkpoint_images(folder: CheckpointFolder, data: str | None, data_root: str | Path | None) -> DataSet:
    """The images a checkpoint was trained on; of a converted one those of `data`, prepared as its config.json says.

    Raises:
        ValueError: a converted one and no data set, or one of other images or classes.
    """
    if folder.trained:
        recipe = read_recipe(folder)
        check_same(data, recipe["data"]["name"])
        return read_images(recipe, data_root)
    if data is None:
        raise ValueError(f"{folder.path} was converted and knows no data set; name one by --data, e.g. --data cifar10")
    config = read_record(folder, CONFIG, Config)
    cfg = config.pretrained_cfg
    size = cfg.input_size
    if data == IMAGE_FOLDER:
        resize = math.floor(size[1] / cfg.crop_pct)  # as timm's evaluation does it
        images = load_data(
            data,
            data_root,
            num_classes=config.num_classes,
            image_size=size[1],
            eval_resize=resize,
            interpolation=cfg.interpolation,
        )
    else:
        images = load_data(data, data_root)
    if images.image_shape != size or images.num_classes != config.num_classes:
        theirs = f"{images.image_shape} and {images.num_classes} classes"
        raise ValueError(f"data: {data} has images of {theirs}, {folder.path} takes {size} and {config.num_classes}")
    return standardized(images, cfg)


def standardized(images: DataSet, cfg: InputConfig) -> DataSet:
    """The images with the constants of a config.json, in place of their data set's usual ones."""
    assert isinstance(images, ImageData | StoredData), "what `load_data` makes"
    mean, std = (tuple(255 * value for value in values) for values in (cfg.mean, cfg.std))
    return replace(images, mean=mean, std=std)


def doubt_of(folder: CheckpointFolder) -> str:
    """What may make a checkpoint's evaluation wrong though nothing is."""
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
