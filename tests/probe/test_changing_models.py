"""A `Probe` follows a model whose layers are put in, replaced or taken out while it trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao import quantization
from torch.overrides import _get_current_function_mode_stack

from condzoo.probe import Probe, measure
from condzoo.probe.hooks import Hook


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


class Tokens(nn.Module):
    """Attention, a linear layer that is called, and one whose weight a function uses."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.used, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.stack([x, x.roll(1, 1), x.flip(1)], 1)
        return self.head(F.linear(self.attention(x, x, x)[0].mean(1), self.used.weight, self.used.bias))


def tokens(model: nn.Module, probe: Probe, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model.zero_grad()
    F.cross_entropy(model(torch.randn(12, 6).double()), torch.randint(4, (12,))).backward()
    probe.step()


def assert_gradients(record, weights):
    for name, weight in weights.items():
        expected = float(torch.linalg.matrix_norm(weight.grad, 2))
        assert record[name].weight_grad == pytest.approx(expected, rel=1e-9), name


def test_weights_unfrozen_between_steps_have_their_gradient():
    model = Tokens().double().requires_grad_(False)
    weights = {
        "attention.in_proj": model.attention.in_proj_weight,
        "attention.out_proj": model.attention.out_proj.weight,
        "used": model.used.weight,
        "head": model.head.weight,
    }
    model.head.requires_grad_(True)
    with Probe(model, every=1) as probe:
        tokens(model, probe)
        assert_gradients(probe.latest, {"head": weights["head"]})
        model.requires_grad_(True)
        tokens(model, probe, 1)
        assert_gradients(probe.latest, weights)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        tokens(model, probe, 2)
        assert list(probe.latest) == ["head"]
    assert not any(weight._backward_hooks for weight in weights.values())


@pytest.mark.parametrize("first", ["critic", "generator"])
def test_a_critic_that_is_frozen_in_a_part_of_the_step_has_its_gradient(first):
    """As a WGAN leaves it where a step ends, and as others freeze it for the step's first pass, too."""
    torch.manual_seed(0)
    critic = Tokens().double().requires_grad_(False)
    x, y = torch.randn(12, 6).double(), torch.randint(4, (12,))
    with Probe(critic, every=1) as probe:
        for _ in range(2):
            critic.zero_grad()
            for part in ("critic", "generator") if first == "critic" else ("generator", "critic"):
                critic.requires_grad_(part == "critic")
                F.cross_entropy(critic(x.clone().requires_grad_(part == "generator")), y).backward()
            critic.requires_grad_(False)
            probe.step()
            assert_gradients(probe.latest, {"used": critic.used.weight, "head": critic.head.weight})


def test_a_weight_exchanged_tied_and_untied_between_steps_has_its_own_gradient():
    """The modules stay the same, and the weight that one of them has left still gets a gradient, as another's."""
    torch.manual_seed(0)
    body = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()]
    model = nn.Sequential(*body, Tokens(), nn.Linear(4, 6), Tokens()).double()
    one, other = model[4].attention, model[6].attention
    old = list(model.parameters())
    with Probe(model, every=1) as probe:
        for at in range(4):
            if at == 1:
                model[2].weight = nn.Parameter(torch.randn(6, 6).double())
            if at == 2:
                model[2].weight = model[0].weight
                one.in_proj_weight, other.in_proj_weight = other.in_proj_weight, one.in_proj_weight
            if at == 3:
                model[2].weight = nn.Parameter(model[0].weight.detach().clone())
            tokens(model, probe, at)
            weights = {"0": model[0].weight, "2": model[2].weight}
            inside = {"4.attention.in_proj": one.in_proj_weight, "6.attention.in_proj": other.in_proj_weight}
            assert_gradients(probe.latest, weights | inside)
    assert not any(weight._backward_hooks for weight in [*old, *model.parameters()])


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


@pytest.mark.filterwarnings("ignore")  # torch's own of torch.ao, where and however it gives them
@pytest.mark.parametrize("fused", [False, True])
def test_training_turns_quantization_aware_before_a_step_that_is_due(kit, fused):
    def trained(every):
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)]
        model = nn.Sequential(*body)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        with Probe(model, every=every) as probe:
            if fused:
                quantization.fuse_modules_qat(model, [["0", "1", "2"]], inplace=True)
            quantization.prepare_qat(model, inplace=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for seed in range(2):
                x, y = kit.images(seed=seed)
                optimizer.zero_grad()
                F.cross_entropy(model(x.float()), y).backward()
                optimizer.step()
                probe.step()
        return model, probe.latest

    (plain, _), (probed, record) = trained(0), trained(1)
    assert list(record) == (["4"] if fused else ["0", "4"])
    kinds = {
        type(hook) for m in probed.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    }
    assert Hook not in kinds
    assert all(torch.equal(probed.state_dict()[name], value) for name, value in plain.state_dict().items())
