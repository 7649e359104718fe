"""What the processes of a run see of a batch at once, against the batches cut up; and what BatchNorm needs."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condzoo.training.accelerators import accelerator
from condzoo.training.parts import (
    check_parts,
    fault_without_images,
    norm_without_variance,
    sees_single_image,
)
from condzoo.training.planning import plan_training

SINGLE = r"^data\.batch_size: got \d+, with which one of \d process\(es\) sees a single image at a time .* and {}"


def cut(recipe: Any, images: int, processes: int) -> list[int]:
    """Sizes of all that any process sees at once in the first epoch."""
    size, found = recipe.data.batch_size, []
    for number, start in enumerate(range(0, images, size)):
        batch = torch.arange(start, min(start + size, images))
        if recipe.optim.name != "gd" and (
            (recipe.data.drop_last and len(batch) < size) or number >= (recipe.iterations or images)
        ):
            continue
        for rank in range(processes):
            found += [len(piece) for piece in batch[rank::processes].chunk(recipe.accumulate)]
    return found


@pytest.mark.parametrize("images", [7, 8, 13])
def test_single_images_are_those_of_the_batches_cut_up(images: int, tiny: Any) -> None:
    for size, parts, processes, drop in itertools.product((2, 3, 5, 6), (1, 2), (1, 2), (True, False)):
        for changes in ({}, {"iterations": 1}, {"iterations": 9}, {"optim": {"name": "gd", "lr": 0.1}}):
            accumulate = 1 if "optim" in changes else parts
            batches = {"data.batch_size": size, "data.drop_last": drop, "accumulate": accumulate}
            recipe = tiny(**{**batches, **changes})
            assert sees_single_image(recipe, images, processes) == (1 in cut(recipe, images, processes))


@pytest.mark.parametrize(
    ("changes", "norm"),
    [
        ({"model.name": "mlp4x24_bn"}, "layers.0.bn"),
        ({"model.name": "cifar_resnet8_lastbn"}, "last_bn"),
        ({"model.name": "cifar_resnet8"}, None),
        ({"model.name": "cifar_resnet8", "data.crop": 4}, "layer3.0.bn1"),
        ({"model.name": "resnet18"}, "layer2.0.bn1"),
        ({"model.name": "mlp4x24"}, None),
    ],
    ids=str,
)
def test_the_norm_that_gets_one_value_of_an_image(changes: dict[str, Any], norm: str | None, tiny: Any) -> None:
    """A norm over maps, too, where they are a pixel; in training on one image torch then has an error of its own."""
    assert norm_without_variance(tiny(**changes), 10) == norm


def test_the_plan_refuses_what_the_run_would(tiny: Any) -> None:
    """Of 1,437 images of digits: an uneven batch of eight GPUs, an epoch's last one, what validation leaves."""
    a100, network = accelerator("a100"), {"model.name": "mlp4x24_bn", "data.batch_size": 9}
    with pytest.raises(ValueError, match=SINGLE.format(r"layers\.0\.bn has no variance")):
        plan_training(tiny(**network), a100, 8)
    assert plan_training(tiny(**network), a100).steps_per_epoch == 159
    network |= {"data.batch_size": 4, "data.drop_last": False}
    with pytest.raises(ValueError, match=SINGLE.format("layers")):
        plan_training(tiny(**network), a100)
    assert plan_training(tiny(**network, **{"data.validation": 37}), a100).steps_per_epoch == 350
    with pytest.raises(ValueError, match=SINGLE.format("layers")):
        plan_training(tiny(**network, **{"data.validation": 36}), a100)


def test_images_that_sync_bn_averages_with_others_are_not_alone(tiny: Any) -> None:
    recipe = tiny(**{"model.name": "mlp4x24_bn", "data.batch_size": 8, "sync_bn": True})
    check_parts(recipe, 1437, 10, processes=8)
    assert sees_single_image(tiny(**{"data.batch_size": 8}), 1437, processes=8)


@pytest.mark.parametrize("rest", [1, 5, 7])
def test_with_sync_bn_every_process_must_see_an_image(rest: int, tiny: Any) -> None:
    """Without one torch's SyncBatchNorm sends zeros of the images' dtype, under autocast not that of the others."""
    changes = {"model.name": "mlp4x24_bn", "data.batch_size": 256, "data.drop_last": False, "sync_bn": True}
    message = (
        r"^data\.batch_size: got 256, with which one of 8 processes sees no image at the end of an epoch of \d+, and "
        r"mlp4x24_bn cannot run on none \(sync_bn needs some of each\); take another, drop_last = true, or fewer"
    )
    for accumulate in (1, 4):
        with pytest.raises(ValueError, match=message):
            check_parts(tiny(**changes, accumulate=accumulate), 3 * 256 + rest, 10, processes=8)
    check_parts(tiny(**changes | {"data.drop_last": True}), 3 * 256 + rest, 10, processes=8)
    check_parts(tiny(**changes, accumulate=4), 3 * 256 + rest + 8, 10, processes=8)
    check_parts(tiny(**changes | {"model.name": "mlp4x24"}), 3 * 256 + rest, 10, processes=1)


class Windows(nn.Module):
    """Cuts images into windows, as timm's Swin does: of no images it does not know how many."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, 8, 8] -> [B, 10]
        return self.fc(x.view(len(x), -1, 4).mean(1))


def test_a_network_that_cannot_run_on_no_image_is_told_before_it_gets_none(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,437 images in batches of 6 the last one has 3."""
    recipe = tiny(**{"data.batch_size": 6, "data.drop_last": False})
    check_parts(recipe, 1437, 10, processes=4)  # an MLP runs on none
    monkeypatch.setattr("condzoo.training.parts.network_of", lambda *_: Windows())
    check_parts(recipe, 1437, 10, processes=3)
    with pytest.raises(ValueError, match=r"^data\.batch_size: got 6, with which one of 4 processes sees no image at "):
        check_parts(recipe, 1437, 10, processes=4)
    check_parts(tiny(**{"data.batch_size": 6}), 1437, 10, processes=4)


class ScaledUp(nn.Sequential):
    """On the meta device torch cannot scale no image up, which it can elsewhere."""

    def __init__(self) -> None:
        super().__init__(nn.Upsample(scale_factor=2.0), nn.Flatten(), nn.Linear(256, 10))


class Refusing(nn.Module):
    """Has no word for it."""

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            raise AssertionError
        return x


@pytest.mark.parametrize(("network", "fault"), [(ScaledUp, None), (Refusing, "AssertionError")])
def test_a_network_is_run_on_no_image_as_the_training_would(
    network: type[nn.Module], fault: str | None, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("condzoo.training.parts.network_of", lambda *_: network())
    before = torch.get_rng_state()
    assert fault_without_images(tiny(), 10) == fault
    assert torch.equal(torch.get_rng_state(), before)
