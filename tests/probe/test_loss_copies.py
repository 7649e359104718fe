"""Losses that use the model itself: exact curvature and certificates are of a copy of it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import curvature, curvature_blocks, kronecker_report, measure, top_curvature

DECAY = 5.0  # its Hessian is 10 I


class Decayed(nn.Module):
    """Cross-entropy and the squared weights of the model that it holds."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("weight", torch.ones(3))

    def forward(self, output, y):
        decay = sum(p.square().sum() for p in self.model.parameters())
        return F.cross_entropy(output, y, weight=self.weight) + DECAY * decay


class Regularized(nn.Sequential):
    """A network with its loss as a method, and one more as a part."""

    def loss(self, output, y):
        return F.cross_entropy(output, y) + DECAY * sum(p.square().sum() for p in self.parameters())


def network(kind=nn.Sequential):
    torch.manual_seed(0)
    return kind(nn.Linear(4, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn((20, 4), generator=generator).double(), torch.arange(20) % 3


def functions(model):
    """Functions that use the model, and are no part of it."""

    def decay(parameters):
        return DECAY * sum(p.square().sum() for p in parameters)

    weights = list(model.parameters())
    return {
        "parameters": lambda output, y: F.cross_entropy(output, y) + decay(model.parameters()),
        "call": lambda output, y: F.cross_entropy(model(batch()[0].float()), y),
        "one a sample": lambda output, y: F.cross_entropy(output, y, reduction="none") + decay(weights),
        "partial": functools.partial(lambda output, y, a: F.cross_entropy(output, y) + a * decay(weights), a=2.0),
    }


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", functions(network()))
def test_a_function_that_uses_the_model_is_one_error(kind, frozen):
    model, (x, y) = network().requires_grad_(not frozen), batch()
    loss = functions(model)[kind]
    asked = [
        lambda: curvature(model, x, y, "hessian", loss=loss),
        lambda: curvature_blocks(model, x, y, "grad_moment", loss=loss),
        lambda: top_curvature(model, x, y, "hessian", loss=loss),
        lambda: kronecker_report(model, x, y, "grad_moment", loss=loss),
        lambda: measure(model, (x.float(), y), loss=loss, certify=True),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=r"the loss uses the model itself \(its parameter '0\.(weight|bias)'\)"):
            ask()
    assert measure(model, (x.float(), y), loss=loss)["0"].output_grad.lambda_max > 0
    assert all(p.requires_grad is not frozen for p in model.parameters())


def held_by(kind):
    """A model and a loss that holds it."""
    model = network(Regularized)
    if kind == "method":
        return model, model.loss
    if kind == "argument":
        return model, functools.partial(lambda output, y, net: net.loss(output, y), net=model)
    if kind == "parameters":
        weights = list(model.parameters())
        decay = lambda output, y, ws: F.cross_entropy(output, y) + DECAY * sum(w.square().sum() for w in ws)  # noqa: E731
        return model, functools.partial(decay, ws=weights)
    return model, Decayed(model)


@pytest.mark.parametrize("kind", ["module", "method", "argument", "parameters"])
def test_a_loss_that_holds_the_model_has_the_copy(kind):
    (model, loss), (x, y) = held_by(kind), batch()
    plain = curvature(model, x, y, "hessian").eigenvalues
    found = curvature(model, x, y, "hessian", loss=loss).eigenvalues
    assert torch.allclose(found, plain + 2 * DECAY, rtol=1e-12)
    top = top_curvature(model, x, y, "hessian", loss=loss).values
    assert float(top[0]) == pytest.approx(float(found[0]), rel=1e-7)
    before = measure(model, (x.float(), y), loss=loss, certify=True)
    assert before.certificate["0"]["output_grad_lambda_max"] < 1e-5
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert not getattr(loss, "_forward_hooks", None)


def test_a_model_that_is_copied_for_inference_mode_has_its_loss_with_it():
    x, y = batch()
    model = network()
    expected = measure(model, (x.float(), y), loss=Decayed(model))
    with torch.inference_mode():
        model = network()
        found = measure(model, (x.float(), y), loss=Decayed(model))
    assert found.loss == expected.loss
    assert found["0"].weight_grad == expected["0"].weight_grad


def test_a_model_that_is_looked_at_without_gradients_may_be_anyones():
    model, (x, y) = network(), batch()

    def loss(output, y):
        with torch.no_grad():
            teacher = model(x.float()).softmax(1)
        return F.cross_entropy(output, teacher.to(next(model.parameters()).device).double()) + 0 * y.sum()

    expected = curvature(model, x, model(x.float()).softmax(1).detach().double(), "hessian").eigenvalues
    assert torch.allclose(curvature(model, x, y, "hessian", loss=loss).eigenvalues, expected, rtol=1e-12, atol=1e-15)


class Summed:
    """Says by an attribute of its class that it sums."""

    reduction = "sum"

    def __call__(self, output, y):
        return (output - F.one_hot(y, 3)).square().sum()


@pytest.mark.parametrize("matrix", ["grad_moment", "hessian"])
def test_a_sum_is_divided_by_the_batch_where_it_says_so_or_is_told(matrix):
    model, (x, y) = network(), batch()

    def told(output, y):
        return Summed()(output, y)

    def asked(**loss):
        found = [
            curvature(model, x, y, matrix, **loss).lambda_max,
            curvature_blocks(model, x, y, matrix, **loss)["0"].lambda_max,
            float(top_curvature(model, x, y, matrix, **loss).values[0]),
        ]
        if matrix == "grad_moment":
            found.append(kronecker_report(model, x, y, matrix, **loss)["0"].exact.lambda_max)
        return found

    mean = asked(loss=lambda output, y: told(output, y) / len(y))
    assert asked(loss=Summed()) == pytest.approx(mean, rel=1e-7)
    assert asked(loss=told, reduction="sum") == pytest.approx(mean, rel=1e-7)
    for ask in (curvature, curvature_blocks, top_curvature, kronecker_report):
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'summ'; did you mean 'sum'"):
            ask(model, x, y, "grad_moment", loss=told, reduction="summ")


def test_a_sum_told_of_gradients_themselves():
    """Of layers without factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.ConvTranspose1d(2, 1, 2), nn.Flatten()).double()
    x, y = batch()
    found = curvature(model, x, y, "grad_moment", loss=lambda o, y: Summed()(o, y), reduction="sum").eigenvalues
    assert torch.allclose(found, curvature(model, x, y, "grad_moment", loss=Summed()).eigenvalues)
    assert found[0] > 0
