"""The validation split: disjoint, complete, stratified, the same each time, in memory and on disk."""

from typing import Any

import numpy as np
import pytest
import torch

from condzoo.data import BatchPlan, ImageData, StoredData, load_data
from condzoo.data.holding_out import SPLIT_SEED, held_out

LABELS = np.array([0] * 50 + [1] * 30 + [2] * 20)


@pytest.mark.parametrize(
    ("validation", "counts"),
    [(0.1, [5, 3, 2]), (10, [5, 3, 2]), (0.5, [25, 15, 10]), (7, [4, 2, 1]), (1, [1, 0, 0]), (99, [49, 30, 20])],
)
def test_every_class_gives_its_share(validation: float, counts: list[int]) -> None:
    stay, out = held_out(LABELS, validation)
    assert sorted([*stay, *out]) == list(range(100))
    assert np.bincount(LABELS[out], minlength=3).tolist() == counts
    assert (np.diff(stay) > 0).all()
    assert (np.diff(out) > 0).all()


def test_the_split_is_the_same_each_time_and_drawn_within_a_class() -> None:
    torch.manual_seed(1)
    first = held_out(LABELS, 0.1)[1].tolist()
    torch.manual_seed(2)
    assert held_out(LABELS, 0.1)[1].tolist() == first
    assert first[:5] != list(range(5))


@pytest.mark.parametrize("validation", [0.1, 0.37, 7, 398])
def test_a_class_gives_its_first_images_in_one_order_of_all(validation: float) -> None:
    """The choice that earlier runs were trained on, found by a pass over all images for every class."""
    labels = np.random.default_rng(0).integers(0, 23, 400) * 3
    _, out = held_out(labels, validation)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
    chosen = [order[labels[order] == label][: np.sum(labels[out] == label)] for label in range(67)]
    assert sorted(np.concatenate(chosen)) == out.tolist()


@pytest.mark.parametrize(
    ("sizes", "validation", "counts"),
    [
        ([1, 1, 100], 0.5, [0, 0, 51]),
        ([1, 1, 1, 1, 4], 3, [0, 0, 0, 0, 3]),
        ([2, 2, 3], 4, [1, 1, 2]),
        ([1, 1, 3], 4, [1, 1, 2]),  # more than can leave each class an image
    ],
)
def test_every_class_keeps_an_image_where_the_number_allows(
    sizes: list[int], validation: float, counts: list[int]
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    _, out = held_out(labels, validation)
    assert np.bincount(labels[out], minlength=len(sizes)).tolist() == counts


@pytest.mark.parametrize(("validation", "count"), [(0.001, 0), (100, 100), (200, 200)])
def test_none_or_all_is_an_error(validation: float, count: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.validation: \S+ holds out {count} of 100 training images; it must"):
        held_out(LABELS, validation)


def test_in_memory() -> None:
    whole, data = load_data("digits"), load_data("digits", validation=0.2)
    assert isinstance(whole, ImageData)
    assert isinstance(data, ImageData)
    assert (data.size("train"), data.size("validation"), data.size("test")) == (1150, 287, 360)
    assert data.validation is not None
    stay, out = held_out(whole.train.labels.numpy(), 0.2)
    assert torch.equal(data.train.images, whole.train.images[stay])
    assert torch.equal(data.validation.images, whole.train.images[out])
    assert data.mean == pytest.approx((data.train.images.double().mean().item(),))  # held out of the constants, too
    labels = torch.cat([y for _, y in data.ordered_batches("validation", BatchPlan(100))])
    assert torch.equal(labels, whole.train.labels[out])
    assert whole.size("validation") == 0
    with pytest.raises(ValueError, match=r"no validation images were held out: data\.validation says how many"):
        next(whole.ordered_batches("validation", BatchPlan(100)))


def test_on_disk(folders: Any) -> None:
    root = folders(train=6)
    whole, data = (
        load_data("imagefolder", root, image_size=16, workers=0, validation=validation) for validation in (None, 3)
    )
    assert isinstance(whole, StoredData)
    assert isinstance(data, StoredData)
    assert (data.size("train"), data.size("validation"), data.size("test")) == (15, 3, 6)
    stay, out = held_out(whole.train.labels, 3)
    for split, index in (("train", stay), ("validation", out)):
        x, y = next(data.ordered_batches(split, BatchPlan(20)))
        x_whole, y_whole = next(whole.ordered_batches("train", BatchPlan(20)))
        assert torch.equal(x, x_whole[index])
        assert torch.equal(y, y_whole[index])
    assert sorted(next(data.ordered_batches("validation", BatchPlan(20)))[1].tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="no validation images were held out"):
        next(whole.ordered_batches("validation", BatchPlan(20)))
