"""F under batch statistics where a pass a sample and class would be too many: random signs, against autograd's rows."""

import pytest
import torch
from torch import nn

from condzoo.probe import curvature, curvature_blocks, gradient_rows, kronecker_report, top_curvature
from condzoo.probe.gradient_rows import gradient_rows as rows_by_layer

SAMPLES, CLASSES = 24, 4


@pytest.fixture
def few_passes(monkeypatch):
    monkeypatch.setattr(gradient_rows, "ONE_BY_ONE", SAMPLES * CLASSES - 1)


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)]
    head = [nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)]
    return nn.Sequential(*body, *head, nn.Linear(3, CLASSES)).double()


def expected_block(model, x):
    """The first convolution's block with independent labels: every sample's label alone, each patch by `unfold`."""
    h = model[0](x).detach().requires_grad_()
    logits = model[1:](h)
    p = logits.softmax(1).detach()
    patches = nn.functional.unfold(x, 3, padding=1)  # [n, i, t]
    total = 0
    for n in range(len(x)):
        for c in range(CLASSES):
            signal = torch.zeros_like(logits)
            signal[n] = p[n, c].sqrt() * (p[n] - torch.eye(CLASSES).double()[c])
            (g,) = torch.autograd.grad(logits, h, signal, retain_graph=True)
            weight = torch.einsum("not,nit->noi", g.flatten(2), patches).flatten(1)
            rows = torch.cat([weight, g.flatten(2).sum(2)], dim=1)
            total = total + rows.T @ rows / len(x)
    return total


@pytest.mark.usefixtures("few_passes")
def test_they_have_the_size_that_independent_labels_have(kit):
    """Without signs BatchNorm takes out what the samples have in common: a twentieth was left here."""
    model, x = network(), kit.images(SAMPLES)[0]
    expected = torch.linalg.eigvalsh(expected_block(model, x)).flip(0)
    found = curvature(model, x, None, block="0", seed=1)
    assert found.arithmetic == "float64, a random sign a sample"
    assert float(found.eigenvalues.sum()) == pytest.approx(float(expected.sum()), rel=0.15)
    assert found.lambda_max == pytest.approx(float(expected[0]), rel=0.2)
    assert torch.equal(found.eigenvalues, curvature(model, x, None, block="0", seed=1).eigenvalues), "seeded"
    assert not torch.equal(found.eigenvalues, curvature(model, x, None, block="0", seed=2).eigenvalues)
    close = dict(rel=1e-7)
    assert curvature_blocks(model, x, None, seed=1)["0"].lambda_max == pytest.approx(found.lambda_max, **close)
    assert float(top_curvature(model, x, None, block="0", seed=1).values[0]) == pytest.approx(found.lambda_max, **close)
    report = kronecker_report(model, x, layers=["0"], seed=1)["0"].exact
    assert (report.lambda_max, report.arithmetic) == (pytest.approx(found.lambda_max, **close), found.arithmetic)


@pytest.mark.usefixtures("few_passes")
def test_their_mean_over_seeds_is_the_expectation(kit):
    model, x = network(), kit.images(SAMPLES)[0]
    expected = expected_block(model, x)

    def matrix(seed):
        rows = rows_by_layer(model, {"0": model[0]}, x, None, None, "fisher", seed)["0"]
        dense = rows.dense(slice(0, rows.vectors))
        return dense.T @ dense / SAMPLES

    each = torch.stack([matrix(seed) for seed in range(36)])
    alone = (each - expected).flatten(1).norm(dim=1).mean()
    assert float((each.mean(0) - expected).norm()) < 0.25 * float(alone)  # a sixth is to be expected


def test_few_labels_are_independent_and_have_no_signs(kit):
    model, x = network(), kit.images(SAMPLES)[0]
    found = curvature(model, x, None, block="0")
    expected = torch.linalg.eigvalsh(expected_block(model, x)).flip(0)
    assert found.arithmetic == "exact, float64"
    assert torch.allclose(found.eigenvalues, expected, rtol=1e-9, atol=1e-12 * float(expected[0]))
    assert torch.equal(found.eigenvalues, curvature(model, x, None, block="0", seed=3).eigenvalues)
