"""Measuring a model of the zoo, or a run, on a data set by name: what `condzoo probe` does."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from condzoo.catalog import list_models, model_info
from condzoo.checkpoints.folder import SUMS
from condzoo.checkpoints.loading import load_folder, read_checkpoint
from condzoo.data import IMAGE_FOLDER, BatchPlan, DataSet, load_data
from condzoo.evaluating import checkpoint_images
from condzoo.models import create_model
from condzoo.probe import Conditioning, measure
from condzoo.training import load_run, read_data
from condzoo.training.precision import resolve_device

PAPER_CROP = 20  # pixels: the usual box of MNIST's digits, where the paper's 12x12 images leave the size open


@dataclass(frozen=True)
class Question:
    """What to measure, on what.

    Attributes:
        target: a model's name, or a run directory (its last weights, its own data); a released name with its tag
            ("arch.tag"), or a checkpoint's folder (trained weights, their own data).
        data: the data set; None: the run's own, or the one the model is made for.
        data_root: where the data set is; None: CONDZOO_DATA, then the cache.
        batches, batch_size: how much of the training set, in a seeded order, without augmentation.
        init: initializer, for a model by name.
        eval_mode: running statistics in place of the batch's (the paper's curves are train mode).
        seed: of the initialization, the order of the examples and the measurement.
    """

    target: str
    data: str | None = None
    data_root: Path | None = None
    batches: int = 4
    batch_size: int = 128
    labels: str = "data"
    conv: str = "channels"
    precision: str = "auto"
    init: str | None = None
    eval_mode: bool = False
    seed: int = 0
    device: str | None = None


def answer(question: Question) -> Conditioning:
    """Build or load the network, read the data, measure.

    Raises:
        ValueError: an unknown model or data set, or data that does not fit the network.
        FileNotFoundError: the data is not there; says where it looked.
    """
    device = resolve_device(question.device)
    model, images = network_and_data(question)
    model.train(not question.eval_mode)
    plan = BatchPlan(question.batch_size, seed=question.seed)
    batches = islice(images.train_batches(plan, epoch=0), question.batches)
    return measure(
        model,
        batches,
        labels=question.labels,
        conv=question.conv,
        precision=question.precision,
        device=str(device),
        seed=question.seed,
    )


def network_and_data(question: Question) -> tuple[torch.nn.Module, DataSet]:
    """The network, and the images it takes."""
    arch, _, tag = question.target.partition(".")
    ours = arch in list_models()
    if (Path(question.target) / SUMS).is_file() or (ours and tag):
        return checkpoint_and_data(question)
    if Path(question.target).is_dir():
        run = load_run(question.target)
        if question.data not in (None, run.recipe.data.name):
            raise ValueError(f"the run was trained on {run.recipe.data.name}, got --data {question.data}; leave it out")
        return run.load_model(), read_data(run.recipe, question.data_root)
    if "/" in question.target:
        raise FileNotFoundError(f"{question.target} is neither a run directory nor a checkpoint's folder")
    info = model_info(question.target)
    name = question.data or (IMAGE_FOLDER if info.dataset == "imagenet" else info.dataset)
    size = info.input_size[1]
    images = load_data(
        name,
        question.data_root,
        crop=PAPER_CROP if (name, size) == ("mnist", 12) else None,
        resize=size,
        image_size=size,
    )
    channels = images.image_shape[0]
    arguments = dict(input_size=images.image_shape) if info.family == "mlp" else dict(in_chans=channels)
    if tag:  # of timm's own
        if question.init is not None:
            raise ValueError(f"--init is for new weights; {question.target} names trained ones")
        model = create_model(question.target, pretrained=True, **arguments)
        if model.num_classes != images.num_classes:
            raise ValueError(
                f"{question.target} tells {model.num_classes} classes apart, {name} has {images.num_classes}"
            )
        return model, images
    torch.manual_seed(question.seed)
    return create_model(info.name, num_classes=images.num_classes, init=question.init, **arguments), images


def checkpoint_and_data(question: Question) -> tuple[torch.nn.Module, DataSet]:
    """A checkpoint's network, by its folder or released name, and the images it was trained on."""
    if question.init is not None:
        raise ValueError(f"--init is for new weights; {question.target} names trained ones")
    checkpoint = read_checkpoint(question.target)
    return load_folder(checkpoint), checkpoint_images(checkpoint, question.data, question.data_root)
