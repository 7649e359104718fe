"""Laws: what must not change a measurement, how it scales, and the theorems, all through the probe."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condzoo.probe import measure

SAMPLES = 12
few = settings(max_examples=10, deadline=None)


def network(seed=0, names=("conv", "bn", "relu", "flat", "fc")):
    torch.manual_seed(seed)
    parts = [nn.Conv2d(2, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential()
    for name, part in zip(names, parts, strict=True):
        model.add_module(name, part)
    return model.double().eval()


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((SAMPLES, 2, 4, 4), generator=generator).double()
    return x, torch.randint(3, (SAMPLES,), generator=generator)


def same(a, b, grads=1.0, tolerance=1e-10):
    """Layer by layer, whatever their names; output gradients of b times `grads`."""
    assert len(a) == len(b)
    for one, other in zip(a.values(), b.values(), strict=True):
        for mine, others in (
            (one.input.eigenvalues, other.input.eigenvalues),
            (one.output_grad.eigenvalues, grads * other.output_grad.eigenvalues),
        ):
            assert float((mine - others).abs().max()) <= tolerance * float(others.max())
        assert one.weight_grad == pytest.approx(math.sqrt(grads) * other.weight_grad, rel=1e-8)


@given(order=st.permutations(range(SAMPLES)), cuts=st.sets(st.integers(1, SAMPLES - 1)), seed=st.integers(0, 99))
@pytest.mark.parametrize("labels", ["data", "model"])
@few
def test_batches_may_be_split_and_ordered_at_will(labels, order, cuts, seed):
    model, (x, y) = network(seed), data(seed)
    ends = [0, *sorted(cuts), SAMPLES]
    batches = [(x[order[a:b]], y[order[a:b]]) for a, b in itertools.pairwise(ends)]
    whole, parts = (measure(model, b, labels=labels, conv="patches", bias=True) for b in ([(x, y)], batches))
    same(parts, whole)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-10)
    assert parts.neurons == whole.neurons
    assert (parts.samples, parts.batches) == (SAMPLES, len(batches))


words = st.text("abcdefgh_", min_size=1, max_size=6).filter(lambda w: not hasattr(nn.Sequential(), w))


@given(names=st.lists(words, min_size=5, max_size=5, unique=True), seed=st.integers(0, 99))
@few
def test_names_of_layers_do_not_matter(names, seed):
    plain, renamed = measure(network(seed), data()), measure(network(seed, names), data())
    assert list(renamed) == [names[0], names[4]]
    same(renamed, plain, tolerance=0.0)
    assert [renamed.neurons[names[2]]] == list(plain.neurons.values())


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@few
def test_gradient_moments_are_quadratic_in_the_scale_of_the_loss(scale, seed):
    model, batch = network(seed), data(seed)
    plain = measure(model, batch)
    scaled = measure(model, batch, loss=lambda output, y: scale * F.cross_entropy(output, y))
    same(scaled, plain, scale**2)
    for name, layer in plain.items():
        for p in (0.3, 0.5):
            kappa = layer.output_grad.condition_number(p)
            assert scaled[name].output_grad.condition_number(p) == pytest.approx(kappa, rel=1e-8)


@given(
    norm=st.booleans(),
    logs=st.lists(st.floats(-1, 1), min_size=3, max_size=6),
    mu=st.floats(0.1, 10),
    seed=st.integers(0, 999),
)
@few
def test_theorems_1_and_2(norm, logs, mu, seed):
    """Scaling weight k by a_k: inputs grow by the factors before, gradients by mu and the factors after (no BN);

    with BN after each layer but the last, inputs stay and gradients change by mu / a_k alone.
    """
    torch.manual_seed(seed)
    factors = [math.exp(log) for log in logs]
    if norm:
        factors[-1] = 1.0  # no BN follows the last layer
    parts = []
    for k in range(len(factors)):
        last = k == len(factors) - 1
        parts += [nn.Linear(6, 6, bias=False)]
        parts += [] if last else ([nn.BatchNorm1d(6, eps=1e-20)] if norm else []) + [nn.ReLU()]
    model = nn.Sequential(*parts).double().train()
    x, grad = torch.randn(20, 6).double(), torch.randn(20, 6).double()

    def linear(scale):
        return lambda output, target: scale * (output * target).sum() / len(target)

    plain = measure(model, (x, grad), loss=linear(1.0))
    with torch.no_grad():
        for layer, a in zip([m for m in model if isinstance(m, nn.Linear)], factors, strict=True):
            layer.weight *= a
    scaled = measure(model, (x, grad), loss=linear(mu))
    for k, (a, b) in enumerate(zip(plain.values(), scaled.values(), strict=True)):
        if a.output_grad.lambda_max == 0:  # every unit after it is dead
            continue
        before = 1.0 if norm else math.prod(factors[:k])
        after = mu / factors[k] if norm else mu * math.prod(factors[k + 1 :])
        assert b.input.lambda_max == pytest.approx(before**2 * a.input.lambda_max, rel=1e-8)
        assert b.output_grad.lambda_max == pytest.approx(after**2 * a.output_grad.lambda_max, rel=1e-8)
        assert b.weight_grad == pytest.approx(before * after * a.weight_grad, rel=1e-8)
        assert b.fisher.lambda_max == pytest.approx((before * after) ** 2 * a.fisher.lambda_max, rel=1e-8)


@pytest.mark.parametrize(("labels", "fisher_type"), [("data", "empirical"), ("model", "type-2")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_factors_equal_those_of_curvlinops(labels, fisher_type, bias):
    """Patches of ungrouped convolutions; its gradient factor sums over positions, this one averages."""
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 2, padding=1), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(27, 3)).double().eval()
    x, y = data()
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    kfac = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        batches,
        fisher_type=fisher_type,
        separate_weight_and_bias=not bias,
        check_deterministic=False,
    )
    kfac.compute_kronecker_factors()
    found = measure(model, batches, labels=labels, conv="patches", bias=bias)
    for name, layer in found.items():
        inputs, grads = (
            torch.linalg.eigvalsh(f[name]).flip(0) for f in (kfac._input_covariances, kfac._gradient_covariances)
        )
        assert torch.allclose(layer.input.eigenvalues, inputs, rtol=1e-10, atol=1e-12 * float(inputs[0]))
        mine = layer.positions * layer.output_grad.eigenvalues
        assert torch.allclose(mine, grads, rtol=1e-9, atol=1e-12 * float(grads[0]))
