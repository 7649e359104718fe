"""Random views: torchvision's own draw, and fb.resnet.torch's written out again with numpy."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from condzoo.data.views import EIGENVALUES, EIGENVECTORS, View, blended, jittered, lit, random_view, seeded, uniform_box

VIEW = View(16, 18)


def image(width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_standard_is_torchvisions_crop_and_flip() -> None:
    theirs = transforms.Compose(
        [transforms.RandomResizedCrop(16), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    for number in range(20):
        with seeded(1, 0, number):
            expected = theirs(image())
        with seeded(1, 0, number):
            assert torch.equal(random_view(image(), VIEW, "standard"), expected)


def test_seeded_draws_are_a_function_of_the_counters_and_leave_the_generator() -> None:
    before = torch.get_rng_state()
    draws = []
    for counters in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)):
        with seeded(*counters):
            draws.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_the_papers_boxes_have_uniform_areas_and_ratios() -> None:
    with seeded(0):
        boxes = [uniform_box(400, 400) for _ in range(1500)]
    assert None not in boxes
    top, left, h, w = (torch.tensor(values, dtype=torch.float64) for values in zip(*boxes, strict=True))
    assert (top + h).max() <= 400
    assert (left + w).max() <= 400
    assert top.min() == 0
    # Boxes that do not fit are drawn again, so the largest are rarer; below half of the image none is.
    small = (w * h / 160_000)[w * h < 80_000]
    w, h = w[w * h < 80_000], h[w * h < 80_000]
    assert small.min() == pytest.approx(0.08, abs=0.002)
    assert small.mean() == pytest.approx(0.29, abs=0.01)
    ratio = torch.maximum(w / h, h / w)  # r or 1 / r, r uniform in [3/4, 4/3]
    assert ratio.max() <= 1.36
    # E max(r, 1/r) = (integral of 1/r over [3/4, 1] + of r over [1, 4/3]) / (4/3 - 3/4)
    assert ratio.mean() == pytest.approx((math.log(4 / 3) + (16 / 9 - 1) / 2) / (7 / 12), abs=0.01)


def test_an_image_too_narrow_for_ten_draws_gives_its_centre() -> None:
    narrow = image(200, 1)
    with seeded(5):
        assert uniform_box(narrow.width, narrow.height) is None
    with seeded(5):
        assert random_view(narrow, VIEW, "paper").shape == (3, 16, 16)


def test_jitter_is_fb_resnet_torchs() -> None:
    pixels = torch.rand(3, 8, 8) * 255
    with seeded(7):
        jittered_pixels = jittered(pixels)
    with seeded(7):
        expected = pixels.double().numpy() / 255
        for kind in torch.randperm(3).tolist():
            alpha = 1 + 0.4 * (2 * float(torch.rand(())) - 1)
            grey = 0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
            target = {0: np.zeros(()), 1: np.full_like(expected, grey.mean()), 2: np.stack([grey] * 3)}[kind]
            expected = alpha * expected + (1 - alpha) * target
    assert np.abs(jittered_pixels.double().numpy() / 255 - expected).max() < 1e-5


def test_jitter_keeps_what_it_must() -> None:
    pixels = torch.rand(3, 8, 8) * 255
    grey = torch.full((3, 8, 8), 100.0)
    assert torch.allclose(blended(pixels, 0, 0.6), pixels * 0.6)
    for kind in (1, 2):  # contrast and saturation leave a uniform grey, and factor 1 leaves everything
        assert torch.allclose(blended(grey, kind, 0.6), grey, atol=1e-3)
        assert torch.allclose(blended(pixels, kind, 1.0), pixels)
    assert blended(pixels, 1, 0.0).std() < 1e-3
    assert torch.allclose(*blended(pixels, 2, 0.0)[:2])


def test_lighting_follows_imagenets_colours() -> None:
    black = torch.zeros(3, 2, 2)
    with seeded(3):
        shifts = torch.stack([lit(black)[:, 0, 0] for _ in range(3_000)]).double() / 255
    expected = EIGENVECTORS @ torch.diag((0.1 * EIGENVALUES) ** 2) @ EIGENVECTORS.T
    assert torch.allclose(torch.cov(shifts.T), expected.double(), atol=4e-5)
    assert shifts.mean(0).abs().max() < 2e-3


def test_the_papers_view_is_not_clipped_and_flipped_half_of_the_time() -> None:
    white = Image.new("RGB", (20, 20), (250, 250, 250))
    half = np.zeros((20, 20, 3), np.uint8)
    half[:, 10:] = 255
    views, flipped = [], 0
    for number in range(200):
        with seeded(0, 0, number):
            views.append(random_view(white, VIEW, "paper").amax())
        with seeded(0, 1, number):
            view = random_view(Image.fromarray(half), View(2, 2), "standard")
            flipped += int(view[0, 0, 0] > view[0, 0, 1])
    assert max(views) > 256
    assert 0.25 < flipped / 200 < 0.6  # boxes on one side only look the same either way


def test_an_unknown_augmentation_is_told() -> None:
    with pytest.raises(
        ValueError, match=r"unknown augmentation 'randaugment'; one of: none, paper, standard, alternating"
    ):
        random_view(image(), VIEW, "randaugment")
