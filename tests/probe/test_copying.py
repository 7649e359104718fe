"""Models that hold what torch does not deep-copy: tensors of their last forward pass, a Probe that is open."""

import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from condzoo.probe import Probe, curvature, curvature_blocks, measure, top_curvature
from condzoo.probe.copying import copied


class Keeping(nn.Module):
    """Keeps what it computes, as attention layers keep their maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = self.first(x).tanh()
        self.inside = {"maps": [(self.hidden.exp(), 1)]}
        return self.second(self.hidden)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 6).double(), torch.randint(3, (9,))


def test_exact_curvature_and_certificate_are_those_of_the_model_before_its_first_pass():
    x, y = batch()
    model = Keeping().double()
    calls = {
        "curvature": lambda: curvature(model, x, y, "hessian").eigenvalues,
        "blocks": lambda: curvature_blocks(model, x, y, "fisher")["first"].eigenvalues,
        "top": lambda: top_curvature(model, x, y, "grad_moment").values,
        "certificate": lambda: torch.tensor(list(measure(model, (x, y), certify=True).certificate["first"].values())),
    }
    before = {name: call() for name, call in calls.items()}
    model.zero_grad()
    for name, call in calls.items():
        model(x)
        kept = model.hidden
        assert torch.equal(call(), before[name]), name
        assert kept.grad_fn is not None


def test_a_copy_has_the_values_of_what_is_kept_and_no_part_in_its_graph():
    x, _ = batch()
    model = Keeping().double()
    model(x)
    copy = copied(model)
    assert torch.equal(copy.hidden, model.hidden)
    assert copy.hidden.grad_fn is None
    assert torch.equal(copy.inside["maps"][0][0], model.inside["maps"][0][0])
    assert copy.first.weight is not model.first.weight


def test_a_pruned_layer_is_copied_and_refused_in_words():
    x, y = batch()
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    prune.l1_unstructured(model[0], "weight", 0.4)
    model(x)
    assert set(measure(model, (x, y), certify=True).certificate) == {"0", "2"}
    with pytest.raises(ValueError, match="a layer whose weight is computed"):
        curvature(model, x, y)


class Functional(nn.Sequential):
    """Ends in a function."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Holding(nn.Module):
    """Holds a Probe of a part of it, as a LightningModule may."""

    def __init__(self):
        super().__init__()
        self.net = Functional(nn.Linear(6, 5), nn.Linear(5, 3)).double()
        self.probe = Probe(self.net, every=1)


def test_a_copy_of_a_module_that_holds_its_open_probe_has_none():
    x, y = batch()
    module = Holding()
    with module.probe:
        average, stored = deepcopy(module), pickle.loads(pickle.dumps(module))
        F.cross_entropy(module.net(x), y).backward()
        for other in (average, stored):
            assert other.probe is None
            assert torch.equal(other.net(x), module.net(x))
        module.probe.step()
    assert (module.probe.latest.samples, module.probe.latest.batches) == (18 + 9, 3)


@pytest.mark.parametrize("how", ["deep copy", "pickle"])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_a_closed_probe_is_one_of_the_copied_network(how, used):
    x, y = batch()
    original = Holding()
    if used:
        with original.probe as probe:
            F.cross_entropy(original.net(x), y).backward()
            probe.step()
    module = deepcopy(original) if how == "deep copy" else pickle.loads(pickle.dumps(original))
    assert module.probe.model is module.net is not original.net
    with module.probe as probe:
        for _ in range(2 if not used else 1):
            F.cross_entropy(module.net(x), y).backward()
            probe.step()
    assert probe.latest.step == 1
    assert probe.latest.samples == probe.latest.neurons["relu()"].rows == 9
