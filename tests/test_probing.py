"""What `condzoo probe` measures on: of images that grow those that are measured alone, in the same batches."""

from itertools import islice
from typing import Any

import pytest
import torch

from condzoo import probing
from condzoo.data import BatchPlan, DataSet, ImageData, LabelledImages, crop_and_resize
from condzoo.probing import Question, answer, network_and_data


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of CIFAR-10: 40 images of noise, also at any other size; what was asked for is noted."""
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = LabelledImages(images, torch.arange(40) % 10)
    asked: list[Any] = []

    def load(name: str, root: Any, *, resize: int | None = None, **_: Any) -> ImageData:
        asked.append(resize)
        resized = LabelledImages(crop_and_resize(images, resize=resize), split.labels)
        return ImageData(name, 10, resized, resized, (125.0,) * 3, (60.0,) * 3)

    monkeypatch.setattr(probing, "load_data", load)
    return asked


def batches(images: DataSet, question: Question) -> list[Any]:
    """What is measured: see `answer`."""
    plan = BatchPlan(question.batch_size, seed=question.seed)
    return list(islice(images.train_batches(plan, epoch=0), question.batches))


@pytest.mark.parametrize(("count", "size"), [(2, 8), (9, 16), (1, 40)], ids=["some", "all but the last", "all"])
def test_images_that_grow_are_resized_as_far_as_they_are_measured(small: list[Any], count: int, size: int) -> None:
    """All of CIFAR-10 at 224 pixels are 9 GB."""
    question = Question("resnet18", data="cifar10", batches=count, batch_size=size, seed=3)
    _, found = network_and_data(question)
    assert small == [None], "as they are stored"
    assert found.size("train") == min(count * size, 40)
    assert found.image_shape == (3, 224, 224)
    whole = batches(probing.load_data("cifar10", None, resize=224), question)
    for (x, y), (images, labels) in zip(batches(found, question), whole, strict=True):
        assert torch.equal(x, images)
        assert torch.equal(y, labels)


def test_more_in_a_batch_than_there_is_is_told(small: list[Any]) -> None:
    question = Question("resnet18", data="cifar10", batch_size=41)
    with pytest.raises(ValueError, match=r"^batch_size: got 41, there are 40 training images; use at most those$"):
        answer(question)


def test_images_that_stay_as_they_are_are_all_there(small: list[Any]) -> None:
    _, found = network_and_data(Question("cifar_resnet8", data="cifar10", batches=1, batch_size=8))
    assert (small, found.size("train")) == ([32], 40)
