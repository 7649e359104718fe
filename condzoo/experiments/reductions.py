"""What an experiment has less than the paper's, in words: its scale, its seeds, its curves, its images."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condzoo.data import IMAGE_FOLDER
from condzoo.data.sources import data_roots, folder_root
from condzoo.experiments.loading import labels_run, planned_runs, scale_of, training_of
from condzoo.experiments.schema import Experiment

IMAGENET = (1000, 1_281_167)  # classes, training images
NOT_IMAGENET = "not ImageNet: "  # how the reduction begins that says so
OF_SEEDS = re.compile(r"\d+ of \d+ seeds")


def reductions(experiment: Experiment, scale: str, seeds: Sequence[int], labels: list[str] | None) -> list[str]:
    """The scale's own reductions, and what a call leaves out besides."""
    left_out = [] if labels is None else [x for x in labels_run(experiment, scale) if x not in labels]
    found = [*scale_of(training_of(experiment), scale).reductions]
    if left_out:
        found.append(f"without {', '.join(left_out)}")
    return found + fewer_seeds(experiment, scale, seeds)


def fewer_seeds(experiment: Experiment, scale: str, seeds: Sequence[int]) -> list[str]:
    """How many seeds there are, where the scale or the paper's has more."""
    scales = training_of(experiment).scales
    most = max(len(scales[name].seeds) for name in scales if name in (scale, "paper"))
    return [f"{len(seeds)} of {most} seeds"] if len(seeds) < most else []


def reductions_of(experiment: Experiment, data: dict[str, Any]) -> list[str]:
    """Those of an experiment's data; the seeds are counted anew, which older files compare with their own scale's."""
    kept = [text for text in data["reductions"] if not OF_SEEDS.fullmatch(text)]
    marks = [text for text in kept if text.startswith(NOT_IMAGENET)]
    others = [text for text in kept if text not in marks]
    return [*others, *fewer_seeds(experiment, data["scale"], data["seeds"]), *marks]


def folder_read(
    experiment: Experiment, scale: str, data: dict[str, Any] | None, data_root: str | Path | None
) -> Path | None:
    """The folder of images that the runs read, whoever named it; None where they read another data set.

    Raises:
        FileNotFoundError: there is none.
    """
    if experiment.training is None:
        return None
    section = planned_runs(experiment, scale, data=data)[0].recipe.data
    return folder_root(data_roots(data_root or section.root)) if section.name == IMAGE_FOLDER else None


def folder_reduction(folder: Path | None) -> list[str]:
    """What a folder of images is, where it is not ImageNet: nobody may take the result for ImageNet's."""
    if folder is None:
        return []
    folders = [path for path in (folder / "train").iterdir() if path.is_dir()]
    images = sum(1 for path in folders for file in path.rglob("*") if file.is_file())
    if (len(folders), images) == IMAGENET:
        return []
    return [f"{NOT_IMAGENET}{len(folders)} classes and {images:,} training images in place of 1,000 and 1,281,167"]
