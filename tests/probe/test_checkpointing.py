"""`Probe` under activation checkpointing, which repeats forward passes within the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Probe


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(kit, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.relu, self.on = nn.ReLU(), False

        def inner(self, h):
            return self.relu(self.body(h))

        def forward(self, x):
            h = self.stem(x.flatten(1))
            h = checkpoint(self.inner, h, use_reentrant=reentrant) if self.on else self.inner(h)
            return self.head(h)

    torch.manual_seed(0)
    model = Checkpointed().double()
    found = []
    for model.on in (False, True):
        with Probe(model) as probe:
            F.cross_entropy(model(kit.images()[0]), kit.images()[1]).backward()
            probe.step()
        model.zero_grad()
        found.append(probe.latest)
    plain, checkpointed = found
    assert list(plain) == list(checkpointed) == ["stem", "body", "head"]
    for name in plain:
        assert torch.equal(plain[name].input.eigenvalues, checkpointed[name].input.eigenvalues)
        assert torch.equal(plain[name].output_grad.eigenvalues, checkpointed[name].output_grad.eigenvalues)
        assert checkpointed[name].samples == 12
    assert checkpointed.neurons["relu"] == plain.neurons["relu"]


@pytest.mark.parametrize("order", ["outside, inside", "inside, outside", "twice inside", "two checkpoints", "nested"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_called_twice_is_measured_once_a_call_under_checkpointing(order, reentrant):
    def run(f, h):
        return checkpoint(f, h, use_reentrant=reentrant) if model.on else f(h)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.ReLU()

        def forward(self, x):
            h, f = self.relu(self.stem(x)), lambda h: self.relu(self.body(h))
            return self.head(
                {
                    "outside, inside": lambda: run(f, f(h)),
                    "inside, outside": lambda: f(run(f, h)),
                    "twice inside": lambda: run(lambda h: f(f(h)), h),
                    "two checkpoints": lambda: run(f, run(f, h)),
                    "nested": lambda: run(lambda h: f(run(f, h)), h),
                }[order]()
            )

    torch.manual_seed(0)
    model, found = Shared().double(), []
    x, y = torch.randn(9, 6).double(), torch.randint(3, (9,))
    for model.on in (False, True):
        with Probe(model) as probe:
            F.cross_entropy(model(x), y).backward()
            probe.step()
        model.zero_grad()
        found.append(probe.latest)
    plain, checkpointed = found
    assert plain["body"].input.rows == 18
    assert checkpointed.neurons == plain.neurons
    assert list(plain) == list(checkpointed)
    for name in plain:
        a, b = plain[name], checkpointed[name]
        assert (a.samples, a.input.rows, a.output_grad.rows) == (b.samples, b.input.rows, b.output_grad.rows)
        assert torch.allclose(a.input.eigenvalues, b.input.eigenvalues, rtol=1e-10, atol=1e-14)
        assert torch.allclose(a.output_grad.eigenvalues, b.output_grad.eigenvalues, rtol=1e-10, atol=1e-14)
        assert b.weight_grad == pytest.approx(a.weight_grad, rel=1e-12)
