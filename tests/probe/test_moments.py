"""Running sums that would outgrow their limit, and the digits that gradients of few rows lose."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, arithmetic, correlations, measure, moments, strided
from condzoo.probe.capture import capture_of
from condzoo.probe.distributed import sum_over_ranks
from condzoo.probe.layer_sums import LayerSums
from condzoo.probe.moments import RunningMoment


@pytest.mark.parametrize("limit", [60, 99])
def test_a_moment_over_the_limit_keeps_nothing_and_goes_on_counting(monkeypatch, limit):
    """10 coordinates: over 60 numbers with the seventh row, over 99 with the tenth, as the sum."""
    monkeypatch.setattr(moments, "LIMIT", limit)
    moment, x = RunningMoment(), torch.randn((1, 1, 10, 3), generator=torch.Generator().manual_seed(0))
    for seen in range(3, 16, 3):
        moment.add(x, "auto", 2.0)
        assert (moment.rows, moment.vectors, moment.shape) == (seen, seen, (1, 10, 10))
        assert (moment.dropped is None) == (10 * min(seen, 10) <= limit)
        assert moment.total is None
        assert sum(part.numel() for part in moment.pending) == (0 if moment.dropped else 10 * seen)
    assert moment.finite
    moment.add(x * math.inf, "auto")
    assert not moment.finite


def test_a_product_over_the_limit_is_dropped(monkeypatch):
    monkeypatch.setattr(moments, "LIMIT", 30)
    moment = RunningMoment()
    for value in (1.0, math.nan):
        moment.add_product(
            lambda wide: pytest.fail("made all the same"), (1, 6), 7, 1.0, torch.full((7, 6), value), "auto"
        )
        assert moment.finite == (value == 1.0)
    assert (moment.dropped, moment.total, moment.rows) == ((1, 6), None, 14)


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2}])
def test_patches_over_the_limit_are_not_multiplied(monkeypatch, settings):
    monkeypatch.setattr(moments, "LIMIT", 143 * 144)
    for way in (correlations, strided):
        monkeypatch.setattr(way, "conv2d_weight", lambda *args, **kwargs: pytest.fail("made all the same"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 4, 3, **settings), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = measure(model, (torch.randn(16, 16, 8, 8), torch.zeros(16, dtype=torch.long)), conv="patches")
    assert "over the limit" in found.skipped["0"]


def test_no_product_waits_to_be_added(monkeypatch, torch_products):
    """Each is as large as the moment."""
    columns, made, most = torch.randn((5, 1, 6, 8), generator=torch.Generator().manual_seed(0)), [], []
    expected, product = arithmetic.gram_float64(columns), arithmetic._piece_sum

    def watched(*args):
        found = product(*args)
        made.append(weakref.ref(found))
        most.append(sum(ref() is not None for ref in made))
        return found

    monkeypatch.setattr(arithmetic, "_piece_sum", watched)
    monkeypatch.setattr(arithmetic, "CHAIN_FLOAT32", 2)
    monkeypatch.setattr(arithmetic, "CHAINS", 1)
    found = arithmetic.gram_float32(columns)
    assert len(most) == 4
    assert max(most) <= 3, "the sum, the one before and the new one"
    assert torch.allclose(found, expected, rtol=1e-5)


def test_the_rows_of_a_depthwise_layer_are_one_chain_each():
    """Sums of squares, of which nothing cancels: in short chains an image would be many products of one number."""
    maps = torch.ones((2, 5, 1, 3136))
    assert [piece.shape for piece in arithmetic.chains(maps, arithmetic.CHAIN_FLOAT32)] == [maps.shape]
    assert len(list(arithmetic.chains(maps.expand(-1, -1, 2, -1), arithmetic.CHAIN_FLOAT32))) > 1


@pytest.mark.parametrize("probed", [False, True])
def test_an_output_as_wide_as_a_vocabulary_is_skipped_with_the_reason(monkeypatch, probed):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn((12, 5), generator=generator), torch.randint(100, (12,), generator=generator)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 100))
    few = measure(model, (x[:8], y[:8]))
    monkeypatch.setattr(moments, "LIMIT", 800)
    assert list(measure(model, (x[:8], y[:8]))) == list(few) == ["0", "2"]
    if probed:
        with Probe(model) as probe:
            for part in (slice(0, 6), slice(6, 12)):
                (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
            probe.step()
        found = probe.latest
    else:
        found = measure(model, [(x[:6], y[:6]), (x[6:], y[6:])])
    assert list(found) == ["0"]
    assert found.skipped["2"].startswith(
        "the gradient of its output has 100 coordinates and 12 rows, whose moment would take"
    )
    assert "measure fewer rows, or leave the layer out by `layers`" in found.skipped["2"]


@pytest.mark.parametrize("alone", [True, False])
def test_processes_together_are_held_to_the_limit_too(process_group, monkeypatch, alone):
    """7 coordinates by 4 rows are too much: for the process alone, or (its limit comes later) for all of them."""
    model = nn.Linear(7, 3)
    capture = capture_of(model, {"": model})
    capture.sums[""] = LayerSums(samples=4)
    rows = torch.randn((1, 1, 7, 4), generator=torch.Generator().manual_seed(0))
    if alone:
        monkeypatch.setattr(moments, "LIMIT", 27)
    capture.sums[""].input.add(rows, "auto")
    monkeypatch.setattr(moments, "LIMIT", 27)
    capture.sums[""].output_grad.add(rows[:, :, :3], "auto")
    sum_over_ranks(capture, model)
    merged = capture.sums[""]
    assert (merged.input.dropped, merged.input.pending, merged.input.vectors) == ((1, 7), [], 4)
    assert merged.output_grad.total is not None


def test_a_head_that_was_dropped_leaves_no_other_layer_as_the_last(monkeypatch):
    """Only the last layer's gradients may be p - y; small ones of a layer before it are not its round-off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 100)).bfloat16()
    model[2].weight.data.mul_(1e-3)
    batch = torch.randn(64, 5).bfloat16(), torch.randint(100, (64,))
    expected = measure(model, batch)["0"].output_grad
    monkeypatch.setattr(moments, "LIMIT", 3200)
    found = measure(model, batch)
    assert "2" in found.skipped
    assert found["0"].output_grad.rank == 6
    assert found["0"].output_grad.noise_floor <= expected.noise_floor


def test_a_head_that_was_not_chosen_leaves_no_other_layer_as_the_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 100)).bfloat16()
    model[2].weight.data.mul_(1e-4)
    batch = torch.randn(64, 5).bfloat16(), torch.randint(100, (64,))
    every, alone = measure(model, batch)["0"].output_grad, measure(model, batch, layers=["0"])["0"].output_grad
    assert torch.equal(alone.eigenvalues, every.eigenvalues)
    assert alone.rank == every.rank == 6
    assert not alone.nulls


@pytest.mark.parametrize("rows", [6, 40])
def test_the_digits_that_a_softmax_loses_are_measured_with_more_classes_than_rows(rows):
    """Confident logits in float32: p - y of 30 classes, as vectors (6 rows) and as their sum (40)."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(30, (rows,), generator=generator)
    x = F.one_hot(y, 30) * 16 + torch.randn((rows, 30), generator=generator)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    for layer in model:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    found = measure(model, (x, y), precision="float64")
    exact = measure(model.double(), (x.double(), y))
    for name in ("0", "1"):
        spectrum, true = found[name].output_grad, exact[name].output_grad
        moved = (spectrum.eigenvalues - true.eigenvalues).abs()
        known = spectrum.eigenvalues > spectrum.noise_floor
        assert bool((moved[known] <= 0.05 * true.eigenvalues[known]).all())
        assert spectrum.noise_floor > 1e-9 * spectrum.lambda_max


@pytest.mark.parametrize("rows", [40, 500])
def test_the_small_gradients_of_a_wide_regression_are_not_taken_for_round_off(rows):
    """A mean over 400 outputs: gradients of 0.006, whose sum is no larger than its terms, in bfloat16."""
    torch.manual_seed(0)
    model, x = nn.Linear(20, 400).bfloat16(), torch.randn(rows, 20).bfloat16()
    target = torch.randn(rows, 400).bfloat16()
    found = measure(model, (x, target), loss=nn.MSELoss())[""].output_grad
    assert (found.rank, found.nulls) == (min(rows, 400), 0)
