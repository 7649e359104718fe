"""Layers called on nothing, by keyword, or whose inputs and outputs are no plain tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, curvature, measure

EMPTY = "called on empty inputs alone"


class Detector(nn.Module):
    """A head for the first few feature maps of a batch, its proposals: as many as `wanted` says, call by call."""

    def __init__(self, wanted):
        super().__init__()
        self.stem, self.head, self.classes = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 2), nn.Linear(4, 4)
        self.relu, self.wanted, self.seen = nn.ReLU(), iter(wanted), []

    def forward(self, x):
        h = self.stem(x)
        proposals = h[: next(self.wanted)]
        self.seen.append(proposals.detach())
        return self.classes(h.mean((2, 3))) + torch.arange(4.0) * self.relu(self.head(proposals)).sum() / 10


def detector(wanted):
    torch.manual_seed(0)
    return Detector(wanted)


@pytest.mark.parametrize("conv", ["channels", "patches"])
def test_a_head_without_proposals_adds_no_rows(kit, conv):
    model, batches = detector([3, 0, 2, 0]), [kit.images(6, seed, torch.float32) for seed in range(4)]
    found = measure(model, batches, conv=conv)
    maps = torch.cat(model.seen)  # of 2 x 2 pixels, one patch
    rows = kit.patch_rows(model.head, maps).flatten(1) if conv == "patches" else kit.rows_of(maps, True)
    expected = kit.eigenvalues(rows, 1, len(rows))
    assert found["head"].input.rows == len(rows)
    assert torch.allclose(found["head"].input.eigenvalues, expected, rtol=1e-5, atol=1e-6 * float(expected[0]))
    assert found["head"].output_grad.rows == 5
    assert found.neurons["relu"].rows == 5


def test_a_training_step_without_proposals_is_measured_and_says_so(kit):
    model = detector([0, 0])
    with Probe(model) as probe:
        for seed in range(2):
            x, y = kit.images(6, seed, torch.float32)
            F.cross_entropy(model(x), y).backward()
        probe.step()
    assert list(probe.latest) == ["stem", "classes"]
    assert probe.latest.skipped == {"head": EMPTY}
    assert not probe.latest.neurons


class Renamed(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


def nested(x):
    return torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)


CALLS = {
    "plain": (nn.Linear, lambda layer, x: layer(x)),
    "by a keyword of its own": (Renamed, lambda layer, x: layer(hidden=x)),
    "Pair whose output is a tuple": (Pair, lambda layer, x: layer(x)[0]),
    "Linear whose input is a sparse_coo tensor": (nn.Linear, lambda layer, x: layer(x.to_sparse())),
    "Linear whose input is a nested tensor": (nn.Linear, lambda layer, x: F.relu(layer(nested(x))).values()),
}


class Called(nn.Module):
    def __init__(self, how):
        super().__init__()
        kind, self.call = CALLS[how]
        torch.manual_seed(0)
        self.first, self.last = kind(48, 5), nn.Linear(5, 4)
        self.double()

    def forward(self, x):
        return self.last(self.call(self.first, x.flatten(1)))


def measurements(model, batch):
    """At rest, and of a training step."""
    with Probe(model) as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        probe.step()
    return measure(model, batch), probe.latest


def test_an_input_passed_by_a_name_of_a_subclass_is_the_input(kit):
    expected = measure(Called("plain"), kit.images())
    for found in measurements(Called("by a keyword of its own"), kit.images()):
        for side in ("input", "output_grad"):
            a, b = (getattr(c["first"], side).eigenvalues for c in (found, expected))
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("how", list(CALLS)[2:])
def test_a_layer_whose_rows_cannot_be_read_is_skipped_by_name(kit, how):
    for found in measurements(Called(how), kit.images()):
        assert list(found) == ["last"]
        skipped = {"first": f"a {how}: its rows are not seen"}
        if "nested" in how:
            skipped["relu()"] = "a ReLU whose output is a nested tensor: its units are not seen"
        assert found.skipped == skipped


@pytest.mark.parametrize("how", list(CALLS)[1:3])
def test_exact_curvature_is_that_of_the_plain_layer(kit, how):
    found, expected = (curvature(Called(h), *kit.images(), "fisher").eigenvalues for h in (how, "plain"))
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected[0])
