"""Outputs on [n, t, d], which torch makes as views, that something then changes in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Probe, curvature, kronecker_report, measure


def part(h):
    h[:, :2].tanh_()
    return h


HOWS = {
    "the output": lambda h: h.tanh_(),
    "the output, by a sum": lambda h: h.add_(1.0).tanh(),
    "another view of it": lambda h: h.transpose(1, 2).tanh_().transpose(1, 2),
    "a part of it": part,
    "nothing": torch.tanh,
}


class Tokens(nn.Module):
    """[n, 3, 4, 4] images as 16 tokens of 3."""

    def __init__(self, how, calls=1):
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.norm, self.how, self.calls = nn.BatchNorm1d(5), HOWS[how], calls

    def forward(self, x):
        h = self.how(self.embed(x.flatten(2).mT.contiguous()))
        for _ in range(self.calls):
            h = self.how(self.body(h.contiguous()))
        return self.head(self.norm(h.mean(1)))


def tokens(how, calls=1):
    torch.manual_seed(0)
    return Tokens(how, calls).double()


@pytest.mark.parametrize("how", HOWS)
def test_gradients_are_those_before_an_operation_in_place(kit, how):
    model, (x, y) = tokens(how), kit.images()
    expected = kit.oracle(model, x, y)
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    for found in (measure(model, (x, y)), probe.latest):
        assert list(found) == ["embed", "body", "head"]
        for name, (_, values) in expected.items():
            grads = found[name].output_grad.eigenvalues
            assert float((grads - values).abs().max()) <= 1e-10 * float(values[0]), name


def test_of_a_layer_called_twice_both_gradients_count(kit):
    x, y = kit.images()
    found, expected = (measure(tokens(how, calls=2), (x, y))["body"] for how in ("the output", "nothing"))
    assert found.output_grad.rows == expected.output_grad.rows == 2 * 12 * 16
    assert torch.allclose(found.output_grad.eigenvalues, expected.output_grad.eigenvalues, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("training", [True, False])
def test_exact_curvature_is_that_of_the_network_written_out_of_place(kit, training):
    """Under batch statistics there is no other way to it than by the rows."""
    (x, y), twins = kit.images(5), [tokens(how).train(training) for how in ("the output", "nothing")]
    for matrix in ("grad_moment", "fisher"):
        found, expected = (curvature(model, x, y, matrix).eigenvalues for model in twins)
        assert float((found - expected).abs().max()) <= 1e-10 * float(expected[0])
        report, plain = (kronecker_report(model, x, y, matrix) for model in twins)
        assert list(report) == list(plain) == ["embed", "body", "head"]
        assert report["body"].exact.lambda_max == pytest.approx(plain["body"].exact.lambda_max, rel=1e-10)
