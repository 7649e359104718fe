"""Augmentation against an image-by-image loop, and what each policy promises."""

from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import functional as F

from condzoo.data.augment import PADDING, Moves, apply_moves, cut_out, draw_moves

IMAGES = torch.randint(0, 256, (24, 3, 10, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def one_by_one(images: Tensor, moves: Moves) -> Tensor:
    """The same moves through torchvision, image by image."""
    mode = "reflect" if moves.reflect else "constant"
    done = []
    for image, top, left, flip in zip(images, moves.top, moves.left, moves.flip, strict=True):
        padded = F.pad(image, [PADDING] * 4, padding_mode=mode)
        cropped = F.crop(padded, int(top), int(left), *image.shape[1:])
        done.append(F.hflip(cropped) if flip else cropped)
    return torch.stack(done)


@pytest.mark.parametrize("name", ["standard", "alternating", "paper"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_moves_equal_torchvisions(name: str, dtype: torch.dtype) -> None:
    for epoch in range(4):
        moves = draw_moves(name, torch.arange(24), seed=1, epoch=epoch, batch=2)
        assert moves is not None
        images = IMAGES.to(dtype)
        assert torch.equal(apply_moves(images, moves), one_by_one(images, moves))


@settings(max_examples=30)
@given(st.sampled_from(["standard", "alternating"]), st.permutations(range(24)), st.integers(1, 24), st.integers(0, 5))
def test_draws_of_an_image_do_not_depend_on_its_batch(name: str, order: list[int], size: int, batch: int) -> None:
    whole = draw_moves(name, torch.arange(24), seed=7, epoch=3, batch=0)
    part = draw_moves(name, torch.tensor(order[:size]), seed=7, epoch=3, batch=batch)
    assert whole is not None
    assert part is not None
    for field in ("top", "left", "flip"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[order[:size]])


def test_standard_reaches_every_offset_and_flips_about_half() -> None:
    moves = draw_moves("standard", torch.arange(5000), seed=0, epoch=0, batch=0)
    assert moves is not None
    assert not moves.reflect
    assert moves.top.unique().tolist() == moves.left.unique().tolist() == list(range(9))
    assert abs(float(moves.flip.double().mean()) - 0.5) < 5 * 0.5 / 5000**0.5


def test_alternating_shows_each_image_both_ways_in_two_epochs() -> None:
    flips, tops = [], []
    for epoch in range(5):
        moves = draw_moves("alternating", torch.arange(5000), seed=2, epoch=epoch, batch=0)
        crops = draw_moves("standard", torch.arange(5000), seed=2, epoch=epoch, batch=0)
        assert moves is not None
        assert crops is not None
        assert torch.equal(moves.top, crops.top)
        assert torch.equal(moves.left, crops.left)
        flips.append(moves.flip)
        tops.append(moves.top)
    for before, after in pairwise(flips):
        assert torch.equal(after, ~before)
    assert abs(float(flips[0].double().mean()) - 0.5) < 5 * 0.5 / 5000**0.5
    # the flip says nothing of the crop: as many at the top are flipped as at the bottom
    assert abs(float(flips[0][tops[0] < 4].double().mean()) - 0.5) < 5 * 0.5 / 2000**0.5
    other = draw_moves("alternating", torch.arange(5000), seed=3, epoch=0, batch=0)
    assert other is not None
    assert 0.4 < float((other.flip ^ flips[0]).double().mean()) < 0.6


@pytest.mark.parametrize("size", [128, 127, 2, 1])
def test_paper_draws_one_offset_and_flips_exactly_half(size: int) -> None:
    offsets, flipped = set(), torch.zeros(size)
    for batch in range(60):
        moves = draw_moves("paper", torch.arange(size), seed=0, epoch=1, batch=batch)
        assert moves is not None
        assert moves.reflect
        assert len(moves.top.unique()) == len(moves.left.unique()) == 1
        assert int(moves.flip.sum()) == size // 2
        offsets.add((int(moves.top[0]), int(moves.left[0])))
        flipped += moves.flip
    assert len(offsets) > 30  # 60 draws of 81
    if size >= 127:
        assert flipped.min() > 10  # the half is another one each time
        assert flipped.max() < 50


def test_draws_change_with_epoch_and_seed() -> None:
    def top(seed: int, epoch: int) -> Tensor:
        moves = draw_moves("standard", torch.arange(100), seed=seed, epoch=epoch, batch=0)
        assert moves is not None
        return moves.top

    assert not torch.equal(top(0, 0), top(0, 1))
    assert not torch.equal(top(0, 0), top(1, 0))
    assert torch.equal(top(0, 0), top(0, 0))


def test_none_moves_nothing() -> None:
    assert draw_moves("none", torch.arange(3), seed=0, epoch=0, batch=0) is None


def test_unknown_augmentation() -> None:
    with pytest.raises(ValueError, match="unknown augmentation 'cutout'; one of: none, paper, standard, alternating"):
        draw_moves("cutout", torch.arange(3), seed=0, epoch=0, batch=0)


def test_reflection_needs_images_larger_than_the_padding() -> None:
    moves = draw_moves("paper", torch.arange(2), seed=0, epoch=0, batch=0)
    assert moves is not None
    with pytest.raises(ValueError, match="needs images over 4 pixels wide, got 4"):
        apply_moves(torch.zeros(2, 1, 4, 4), moves)


@pytest.mark.parametrize(("side", "shape"), [(1, (3, 9, 7)), (4, (1, 8, 8)), (5, (3, 10, 6)), (7, (2, 8, 8))])
def test_a_square_is_cut_out_around_any_pixel(side: int, shape: tuple[int, int, int]) -> None:
    images = torch.ones(4000, *shape)
    height, width = shape[1:]
    cut = cut_out(images, torch.arange(4000), side, seed=1, epoch=2)
    assert images.min() == 1  # what came is as it was
    assert torch.equal(cut, cut[:, :1].expand_as(cut))
    centres = set()
    for hole in (cut[:, 0] == 0).numpy():
        rows, columns = hole.any(1).nonzero()[0], hole.any(0).nonzero()[0]
        expected = numpy.zeros_like(hole)
        expected[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert (hole == expected).all()
        # from the edge that is inside the image to the centre
        row = rows[0] + side // 2 if rows[0] > 0 else rows[-1] - (side - 1 - side // 2)
        column = columns[0] + side // 2 if columns[0] > 0 else columns[-1] - (side - 1 - side // 2)
        assert len(rows) == min(row - side // 2 + side, height) - max(row - side // 2, 0)
        assert len(columns) == min(column - side // 2 + side, width) - max(column - side // 2, 0)
        centres.add((int(row), int(column)))
    assert centres == {(row, column) for row in range(height) for column in range(width)}


def test_squares_depend_on_image_epoch_and_seed_alone_and_not_on_the_crop() -> None:
    images, index = torch.ones(2000, 1, 9, 9), torch.arange(2000)
    cut = cut_out(images, index, 1, seed=4, epoch=1)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cut_out(images, order, 1, seed=4, epoch=1), cut[order])
    for other in (cut_out(images, index, 1, seed=4, epoch=2), cut_out(images, index, 1, seed=5, epoch=1)):
        assert 0 < int((other == cut).flatten(1).all(1).sum()) < 80  # 1 of 81 by chance
    moves = draw_moves("standard", index, seed=4, epoch=1, batch=0)
    assert moves is not None
    row = (cut == 0).flatten(1).int().argmax(1) // 9
    assert abs(float(torch.corrcoef(torch.stack([row.double(), moves.top.double()]))[0, 1])) < 5 / 2000**0.5


def test_cutting_out_keeps_the_memory_format_and_takes_no_images() -> None:
    images = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    assert cut_out(images, torch.arange(6), 3, seed=0, epoch=0).is_contiguous(memory_format=torch.channels_last)
    assert cut_out(images[:0], torch.arange(0), 3, seed=0, epoch=0).shape == (0, 3, 8, 8)
