"""Measuring a model of the zoo, or a run, on a data set by name: what `condzoo probe` does."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from condzoo.catalog import list_models, model_info
from condzoo.checkpoints.folder import SUMS
from condzoo.checkpoints.loading import load_folder, read_checkpoint
from condzoo.data import (
    DATASETS,
    IMAGE_FOLDER,
    BatchPlan,
    DataSet,
    ImageData,
    LabelledImages,
    crop_and_resize,
    epoch_order,
    load_data,
)
from condzoo.evaluating import checkpoint_images, folder_of, timms_images, without_origin
from condzoo.models import create_model
from condzoo.probe import Conditioning, measure
from condzoo.training import load_run, read_data
from condzoo.training.precision import resolve_device
from condzoo.training.run_directory import RECIPE

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
    if question.batch_size > images.size("train"):
        raise ValueError(
            f"batch_size: got {question.batch_size}, there are {images.size('train')} training images; "
            "use at most those"
        )
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
    question = replace(question, target=str(without_origin(question.target)))
    arch, _, tag = question.target.partition(".")
    ours, folder = arch in list_models(), folder_of(question.target)
    is_run = (folder / RECIPE).is_file() and not (folder / SUMS).is_file()
    if (folder / SUMS).is_file() or (ours and tag and not is_run):
        return checkpoint_and_data(question)
    if folder.is_dir():
        run = load_run(folder)
        if question.data not in (None, run.recipe.data.name):
            raise ValueError(f"the run was trained on {run.recipe.data.name}, got --data {question.data}; leave it out")
        return run.load_model(), read_data(run.recipe, question.data_root)
    if "/" in question.target:
        raise FileNotFoundError(f"{question.target} is neither a run directory nor a checkpoint's folder")
    info = model_info(question.target)
    name = question.data or (IMAGE_FOLDER if info.dataset == "imagenet" else info.dataset)
    if tag:
        return timms_and_data(question, name)
    images = resized_images(name, info.input_size[1], question)
    arguments = dict(input_size=images.image_shape) if info.family == "mlp" else dict(in_chans=images.image_shape[0])
    torch.manual_seed(question.seed)
    return create_model(info.name, num_classes=images.num_classes, init=question.init, **arguments), images


def resized_images(name: str, size: int, question: Question) -> DataSet:
    """A data set at the size that a network is made for.

    Where images grow only those that are measured are there, since all of CIFAR-10 at ImageNet's size is 9 GB; but for
    sets whose constants are those of their images, all of them.
    """
    stored = DATASETS.get(name)
    if stored is not None and stored.mean is not None and stored.size < size:
        images = load_data(name, question.data_root)
        assert isinstance(images, ImageData), "what fits into memory"
        return measured_alone(images, size, question)
    crop = PAPER_CROP if (name, size) == ("mnist", 12) else None
    return load_data(name, question.data_root, crop=crop, resize=size, image_size=size)


def measured_alone(data: ImageData, size: int, question: Question) -> ImageData:
    """The training images of the first batches, resized, in the order in which the same batches are made of them."""
    chosen = epoch_order(len(data.train), question.seed, 0)[: question.batches * question.batch_size]
    places = torch.empty_like(chosen)
    places[epoch_order(len(chosen), question.seed, 0)] = chosen
    train = LabelledImages(crop_and_resize(data.train.images[places], resize=size), data.train.labels[places])
    return replace(data, train=train, test=LabelledImages(train.images[:0], train.labels[:0]))


def timms_and_data(question: Question, data: str) -> tuple[torch.nn.Module, DataSet]:
    """A trained network of timm's own, and images prepared as its weights were trained for."""
    check_no_init(question)
    images = timms_images(question.target, data, question.data_root)
    return create_model(question.target, pretrained=True), images


def checkpoint_and_data(question: Question) -> tuple[torch.nn.Module, DataSet]:
    """A checkpoint's network, by its folder or released name, and the images it was trained on."""
    check_no_init(question)
    checkpoint = read_checkpoint(question.target)
    return load_folder(checkpoint), checkpoint_images(checkpoint, question.data, question.data_root)


def check_no_init(question: Question) -> None:
    """See that no initializer is asked for where the weights are trained ones."""
    if question.init is not None:
        raise ValueError(f"--init is for new weights; {question.target} names trained ones")
