"""Under another default device, as a notebook sets it: "meta" has no numbers, so that what lands there is an error."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from condzoo.data import AUGMENTATIONS, Batch, BatchPlan, DataSet, check_images, load_data


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """What a function gives while the default device is another one."""

    def run(action: Callable[[], Any]) -> Any:
        torch.set_default_device("meta")
        try:
            return action()
        finally:
            torch.set_default_device(None)

    yield run
    torch.set_default_device(None)


def some_batches(data: DataSet, plan: BatchPlan) -> list[Batch]:
    return [*data.train_batches(plan, epoch=1), *data.ordered_batches("test", plan)]


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    for (x, y), (x_expected, y_expected) in zip(found, expected, strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_set_in_memory_is_the_same(augment: str, elsewhere: Any) -> None:
    plan = BatchPlan(512, augment, cutout=2)
    data = load_data("digits", validation=0.1)
    found = elsewhere(lambda: load_data("digits", validation=0.1))
    assert (found.mean, found.std) == (data.mean, data.std)
    assert torch.equal(found.validation.labels, data.validation.labels)
    assert_equal(elsewhere(lambda: some_batches(found, plan)), some_batches(data, plan))


def test_files_are_read_on_the_cpu(make_set: Any, tmp_path: Path, elsewhere: Any) -> None:
    for name in ("cifar10", "mnist"):
        written = make_set(name)
        data = elsewhere(lambda name=name: load_data(name, tmp_path, crop=20, resize=12))
        np.testing.assert_array_equal(data.test.labels.numpy(), written["test_labels"])
        assert data.train.images.device.type == "cpu"


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_images_that_are_decoded_in_this_process_are_the_same(augment: str, folders: Any, elsewhere: Any) -> None:
    root, plan = folders(), BatchPlan(4, augment, cutout=2)
    data = load_data("imagefolder", root, image_size=16, workers=0)
    assert_equal(elsewhere(lambda: some_batches(data, plan)), some_batches(data, plan))
    assert elsewhere(lambda: list(check_images(root, workers=0))) == []
