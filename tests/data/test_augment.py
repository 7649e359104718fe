"""Augmentation against an image-by-image loop, and what each policy promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import functional as F

from condzoo.data.augment import PADDING, Moves, apply_moves, draw_moves

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


@pytest.mark.parametrize("name", ["standard", "paper"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_moves_equal_torchvisions(name: str, dtype: torch.dtype) -> None:
    for epoch in range(4):
        moves = draw_moves(name, torch.arange(24), seed=1, epoch=epoch, batch=2)
        assert moves is not None
        images = IMAGES.to(dtype)
        assert torch.equal(apply_moves(images, moves), one_by_one(images, moves))


@settings(max_examples=30)
@given(st.permutations(range(24)), st.integers(1, 24), st.integers(0, 5))
def test_standard_draws_do_not_depend_on_the_batch(order: list[int], size: int, batch: int) -> None:
    whole = draw_moves("standard", torch.arange(24), seed=7, epoch=3, batch=0)
    part = draw_moves("standard", torch.tensor(order[:size]), seed=7, epoch=3, batch=batch)
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
    with pytest.raises(ValueError, match="unknown augmentation 'cutout'; one of: none, paper, standard"):
        draw_moves("cutout", torch.arange(3), seed=0, epoch=0, batch=0)


def test_reflection_needs_images_larger_than_the_padding() -> None:
    moves = draw_moves("paper", torch.arange(2), seed=0, epoch=0, batch=0)
    assert moves is not None
    with pytest.raises(ValueError, match="needs images over 4 pixels wide, got 4"):
        apply_moves(torch.zeros(2, 1, 4, 4), moves)
