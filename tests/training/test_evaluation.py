"""How many images an evaluation sees at once; what it counts is tested where runs are evaluated."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condzoo.data import BatchPlan, ImageData, LabelledImages, load_data
from condzoo.training import evaluation
from condzoo.training.evaluation import evaluate, images_at_once
from condzoo.training.precision import Numerics

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "pixels", "expected"),
    [("cuda", 28, 1000), ("cuda", 32, 1000), ("cuda", 224, 256), ("cuda", 5000, 1), ("cpu", 224, 125)],
)
def test_larger_images_are_evaluated_fewer_at_once(device: str, pixels: int, expected: int) -> None:
    data = SimpleNamespace(image_shape=(3, pixels, pixels))
    assert images_at_once(data, torch.device(device)) == expected  # type: ignore[arg-type]


def test_an_evaluation_keeps_to_it_and_misses_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MOST_PIXELS", 100 * 8 * 8)
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = evaluate(model, load_data("digits"), Numerics("fp32", False, CPU))
    assert (seen, found.total) == ([100, 100, 100, 60], 360)


def no_windows(x: torch.Tensor) -> None:
    x.view(len(x), -1, 4)


def test_a_network_is_not_run_on_a_last_batch_that_has_no_image_for_this_process() -> None:
    """Many of timm's cannot: without an image they do not know into how many windows it is cut."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_forward_pre_hook(lambda module, args: no_windows(args[0]))
    data = load_data("digits")
    assert isinstance(data, ImageData)
    odd = replace(data, test=LabelledImages(data.test.images[:351], data.test.labels[:351]))
    batches = list(odd.ordered_batches("test", BatchPlan(50, part=1, parts=2)))
    assert [len(y) for _, y in batches[-2:]] == [25, 0]
    assert evaluation._sums(model, batches, Numerics("fp32", False, CPU))[0] > 0
