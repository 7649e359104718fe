"""Batches: every image once an epoch, from any place on, in parts without overlap."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

from condzoo.data import (
    BatchPlan,
    ImageData,
    LabelledImages,
    batches_per_epoch,
    epoch_order,
)
from condzoo.data.augment import cut_out


def numbered_images(count: int) -> LabelledImages:
    """Images that carry their own number, as pixels and as label."""
    numbers = torch.arange(count)
    return LabelledImages(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 6, 6).contiguous(), numbers)


DATA = ImageData("numbered", 10, numbered_images(50), numbered_images(23), (0.0, 1.0), (1.0, 2.0))
PLAN = BatchPlan(batch_size=8, seed=3)


def labels(plan: BatchPlan, epoch: int, start: int = 0) -> list[list[int]]:
    return [y.tolist() for _, y in DATA.train_batches(plan, epoch, start)]


def test_an_epoch_holds_every_image_at_most_once_and_drops_the_rest() -> None:
    batches = labels(PLAN, epoch=0)
    assert [len(batch) for batch in batches] == [8] * 6
    assert len(set(chain(*batches))) == 48
    kept = labels(replace(PLAN, drop_last=False), epoch=0)
    assert [len(batch) for batch in kept] == [8] * 6 + [2]
    assert sorted(chain(*kept)) == list(range(50))


def test_order_is_seeded_by_epoch_and_seed() -> None:
    assert labels(PLAN, 0) == labels(PLAN, 0)
    assert labels(PLAN, 0) != labels(PLAN, 1)
    assert labels(PLAN, 0) != labels(replace(PLAN, seed=4), 0)
    assert epoch_order(50, 3, 0).tolist()[:8] == labels(PLAN, 0)[0]


@pytest.mark.parametrize(("augment", "cutout"), [("none", None), ("standard", 3), ("alternating", None), ("paper", 2)])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_an_epoch_goes_on_from_any_batch(augment: str, cutout: int | None, start: int) -> None:
    plan = replace(PLAN, augment=augment, cutout=cutout)
    whole = list(DATA.train_batches(plan, 2))
    rest = list(DATA.train_batches(plan, 2, start))
    assert len(rest) == 6 - start
    for (x, y), (x_rest, y_rest) in zip(whole[start:], rest, strict=True):
        assert torch.equal(x, x_rest)
        assert torch.equal(y, y_rest)


@pytest.mark.parametrize(("augment", "cutout"), [("none", None), ("standard", 3), ("alternating", None), ("paper", 2)])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_split_each_global_batch_without_overlap_or_omission(
    augment: str, cutout: int | None, parts: int
) -> None:
    plan = replace(PLAN, augment=augment, cutout=cutout, drop_last=False)
    split = [list(DATA.train_batches(replace(plan, part=k, parts=parts), 1)) for k in range(parts)]
    for number, (x, y) in enumerate(DATA.train_batches(plan, 1)):
        for k in range(parts):
            x_part, y_part = split[k][number]
            assert torch.equal(y_part, y[k::parts])
            assert torch.equal(x_part, x[k::parts])


def test_squares_are_cut_out_of_training_images_alone_after_they_are_normalized() -> None:
    data, plan = replace(DATA, mean=(-9.0, -9.0)), replace(PLAN, cutout=4)
    for (x, y), (cut, y_cut) in zip(data.train_batches(PLAN, 1), data.train_batches(plan, 1), strict=True):
        assert torch.equal(y, y_cut)
        assert x.min() > 0
        assert torch.equal(cut, cut_out(x, y, 4, seed=PLAN.seed, epoch=1))
        assert (cut == 0).flatten(1).any(1).all()
    assert all(bool((x > 0).all()) for x, _ in data.ordered_batches("train", plan))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_ordered_batches_hold_every_image_once(parts: int) -> None:
    seen = [
        [y.tolist() for _, y in DATA.ordered_batches("test", BatchPlan(8, part=k, parts=parts))] for k in range(parts)
    ]
    assert sorted(chain(*chain(*seen))) == list(range(23))
    if parts == 1:
        assert list(chain(*seen[0])) == list(range(23))


def test_pixels_are_normalized_by_channel() -> None:
    for x, y in DATA.train_batches(PLAN, 0):
        expected = torch.stack([y, (y - 1) / 2], 1).float()
        assert torch.equal(x, expected[:, :, None, None].expand_as(x))
        assert x.dtype == torch.float32


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format(channels_last: bool) -> None:
    x, _ = next(iter(DATA.train_batches(replace(PLAN, channels_last=channels_last), 0)))
    assert x.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert x.is_contiguous() != channels_last


def test_a_batch_larger_than_the_set_is_an_error() -> None:
    message = r"batch_size 51 is larger than the 50 training images and drop_last leaves no batch; use at most 50"
    with pytest.raises(ValueError, match=message):
        next(DATA.train_batches(replace(PLAN, batch_size=51), 0))
    assert batches_per_epoch(50, 51, drop_last=False) == 1
