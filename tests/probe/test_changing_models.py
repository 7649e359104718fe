"""A `Probe` follows a model whose layers are put in, replaced or taken out while it trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from condzoo.probe import Probe, measure


class Adapted(nn.Module):
    """A linear layer and a low-rank path beside it, as LoRA puts one in."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.up = nn.Linear(rank, base.out_features, bias=False).to(base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Functional(nn.Module):
    """Calls a ReLU as a function, itself and in a part."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.body(x)))


def new_head(model: nn.Sequential) -> None:
    model[-1] = nn.Linear(model[-1].in_features, 4).double()


def deeper(model: nn.Sequential) -> None:
    head = model[-1]
    model[-1] = nn.Sequential(nn.Linear(head.in_features, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)).double()


def low_rank(model: nn.Sequential) -> None:
    model[-1] = Adapted(model[-1], 2)


def attention(model: nn.Sequential) -> None:
    class Tokens(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.inner, self.head = nn.MultiheadAttention(head.in_features, 1, batch_first=True).double(), head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x[:, None], x[:, None], x[:, None])[0][:, 0])

    model[-1] = Tokens(model[-1])


def parametrized(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[-1])


CHANGES = [new_head, deeper, low_rank, attention, parametrized]


def step(model, kit, seed, probe):
    x, y = kit.images(seed=seed)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    probe.step()


def same(found, expected):
    assert list(found) == list(expected)
    for name, layer in expected.items():
        for side in ("input", "output_grad"):
            x, y = getattr(found[name], side).eigenvalues, getattr(layer, side).eigenvalues
            assert float((x - y).abs().max()) <= 1e-12 * float(y.max())
        for norm in ("weight", "weight_grad"):
            x, y = getattr(found[name], norm), getattr(layer, norm)
            assert x == y or x == pytest.approx(y, rel=1e-9), (name, norm)
    assert (found.neurons, found.skipped) == (expected.neurons, expected.skipped)


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
@pytest.mark.parametrize("due", [True, False], ids=["before_a_due_step", "before_another"])
def test_layers_that_changed_are_measured_as_they_are_now(kit, change, due):
    model = kit.build("mlp")
    old = list(model.modules())
    with Probe(model, every=1 if due else 2) as probe:
        step(model, kit, 0, probe)
        change(model)
        if not due:
            step(model, kit, 1, probe)
        expected = measure(model, kit.images(seed=2))
        step(model, kit, 2, probe)
    same(probe.latest, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*old, *model.modules()])


def test_a_layer_asked_for_and_taken_out_is_named(kit):
    model = kit.build("mlp")
    with Probe(model, every=1, layers=["1", "5"]) as probe:
        step(model, kit, 0, probe)
        assert list(probe.latest) == ["1", "5"]
        deeper(model)
        step(model, kit, 1, probe)
        assert list(probe.latest) == ["1"]
        assert probe.latest.skipped == {"5": "the model no longer has a layer of this name"}
        model[-1] = nn.Linear(7, 4).double()
        step(model, kit, 2, probe)
    assert list(probe.latest) == ["1", "5"]
    assert not probe.latest.skipped


def test_a_lazy_layer_is_measured_once_it_knows_its_size(kit):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).double()
    with Probe(model, every=1) as probe:
        assert "1" in probe._unmeasurable
        step(model, kit, 0, probe)  # it is still lazy when this step's hooks come
        step(model, kit, 1, probe)
    assert list(probe.latest) == ["1"]
    assert not probe.latest.skipped


def test_a_pass_that_raised_before_the_change_is_forgotten(kit):
    model = kit.build("mlp")
    x, y = kit.images(seed=3)
    with Probe(model) as probe:
        with pytest.raises(RuntimeError):
            model(x[:, :2])
        new_head(model)
        expected = measure(model, (x, y))
        F.cross_entropy(model(x), y).backward()
        probe.step()
    same(probe.latest, expected)


def test_functional_relus_are_counted_once_and_watched_no_longer_than_the_call(kit):
    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 9)).double()
    model = Functional(body, nn.Linear(9, 4).double())
    with Probe(model) as probe:
        model.head = Functional(nn.Linear(9, 6), nn.Linear(6, 4)).double()
        expected = measure(model, kit.images(seed=0))
        step(model, kit, 0, probe)
    assert list(probe.latest.neurons) == ["relu()", "head.relu()"]
    same(probe.latest, expected)
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("layers", [[nn.LazyLinear(4)], [nn.LazyLinear(4), nn.LazyBatchNorm1d()]])
def test_a_lazy_model_is_refused_with_what_to_do(layers):
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"layer '0' is not initialized yet \(lazy\); run one batch through"):
        measure(model, (torch.randn(6, 5), torch.arange(6) % 3))
    assert isinstance(model[0], nn.LazyLinear)
