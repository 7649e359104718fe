"""Passes inside torch.func's transforms, whose tensors hold no values, and backward passes that vmap cannot run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Probe, curvature, measure


def parts() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    return model, torch.randn(9, 6).double(), torch.randint(3, (9,))


def test_passes_inside_transforms_are_no_training_steps():
    model, x, y = parts()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x, y):
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    plain = probe.latest
    with Probe(model) as probe:
        grad(loss)(weights, x, y)
        vmap(grad(loss), (None, 0, 0))(weights, x[:, None], y[:, None])
        jacrev(model)(x)
        F.cross_entropy(model(x), y).backward()
        probe.step()
    assert (probe.latest.samples, probe.latest.skipped) == (9, {})
    assert probe.latest.neurons == plain.neurons
    for name in plain:
        assert torch.equal(probe.latest[name].output_grad.eigenvalues, plain[name].output_grad.eigenvalues)


def every_derivative(output, inputs, how):
    """[n * k, ...]: one backward pass for all outputs; `how` says by which vmap."""
    each = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
    if how == "is_grads_batched":
        return torch.autograd.grad(output, inputs, each, is_grads_batched=True, create_graph=True)
    return vmap(lambda one: torch.autograd.grad(output, inputs, one, create_graph=True))(each)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_backward_passes_of_many_gradients_at_once_are_not_read(how, mode):
    (plain, x, y), (model, _, _) = parts(), parts()
    with Probe(plain) as alone:
        F.cross_entropy(plain(x), y).backward()
        alone.step()
    with Probe(model) as probe:
        model.train(mode == "train")
        output = model(x)
        every_derivative(output, list(model.parameters()), how)
        F.cross_entropy(output if mode == "train" else model.train()(x), y).backward()
        probe.step()
    assert list(probe.latest) == list(alone.latest)
    for name, layer in alone.latest.items():
        assert torch.equal(probe.latest[name].output_grad.eigenvalues, layer.output_grad.eigenvalues)
        assert probe.latest[name].weight_grad == layer.weight_grad


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_a_penalty_on_a_jacobian_trains_as_without_a_probe(how):
    def trained(every):
        model, x, y = parts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Probe(model, every=every) as probe:
            for _ in range(2):
                optimizer.zero_grad()
                output = model(x.requires_grad_())
                (jacobian,) = every_derivative(output, [x], how)
                (F.cross_entropy(output, y) + jacobian.square().mean()).backward()
                optimizer.step()
                probe.step()
        return model.state_dict()

    alone, probed = trained(0), trained(1)
    assert all(torch.equal(probed[name], value) for name, value in alone.items())


@pytest.mark.parametrize("batched", [True, False])
def test_layers_called_inside_a_transform_are_skipped_by_name(batched):
    class Energy(nn.Module):
        def __init__(self, potential, head):
            super().__init__()
            self.potential, self.head = potential, head

        def forward(self, x):
            force = grad(lambda z: self.potential(z).sum())
            return self.head(vmap(force)(x) if batched else force(x))

    model, x, y = parts()
    found = measure(Energy(model, nn.Linear(6, 3).double()), (x, y))
    assert list(found) == ["head"]
    assert all("inside a transform of torch.func" in why for why in found.skipped.values())
    assert {"potential.0", "potential.2"} <= set(found.skipped)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_attention_inside_transforms_is_left_to_run_and_skipped_by_name():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = Tokens(), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.head(grad(lambda z: self.tokens(z).sum())(x).mean(1))

    model, x, y = Tokens(), torch.randn(4, 5, 6).double(), torch.arange(4) % 3
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x, y):
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        plain = vmap(grad(loss), (None, 0, 0))(weights, x[:, None], y[:, None])
        with Probe(model) as probe:
            probed = vmap(grad(loss), (None, 0, 0))(weights, x[:, None], y[:, None])
            grad(loss)(weights, x, y)
            F.cross_entropy(model(x), y).backward()
            probe.step()
        found = measure(Force(), (x, y))
    assert all(torch.equal(probed[name], plain[name]) for name in plain)
    assert (list(probe.latest), probe.latest.skipped) == (["attention.in_proj", "attention.out_proj", "head"], {})
    assert list(found) == ["head"]
    inside = {"tokens.attention.in_proj", "tokens.attention.out_proj", "tokens.head"}
    assert all("inside a transform of torch.func" in found.skipped[name] for name in inside)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_curvature_where_vmap_cannot_run_the_backward_pass(matrix):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.on = nn.Linear(6, 5), nn.Linear(5, 3), False
            self.norm = nn.BatchNorm1d(5)

        def inner(self, x):
            return F.dropout(self.first(x).tanh(), 0.3)

        def forward(self, x):
            h = checkpoint(self.inner, x, use_reentrant=False) if self.on else self.inner(x)
            return self.second(self.norm(h))

    torch.manual_seed(0)
    model, x, y = Dropped().double(), torch.randn(9, 6).double(), torch.randint(3, (9,))
    plain = curvature(model, x, y, matrix)
    model.on = True
    found = curvature(model, x, y, matrix)
    assert torch.allclose(found.eigenvalues, plain.eigenvalues, rtol=1e-9, atol=1e-12 * plain.lambda_max)
