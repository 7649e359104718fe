"""The report on Proposition 1 against dense blocks from per-sample gradients and torch.kron of dense factors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from condzoo.probe import costs, curvature, kronecker_report, measure


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 3, 2, stride=2, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 2, padding=1), nn.Tanh()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 3)).double()


def data(samples):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((samples, 2, 4, 4), generator=generator).double()
    return x, torch.randint(3, (samples,), generator=generator)


def dense(model, x, y, matrix):
    """For each layer the exact block and T E[a a^T] (x) E[g g^T], a sample and a label at a time."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    exact, inputs, grads = (dict.fromkeys(layers, 0.0) for _ in range(3))
    seen, outputs = {}, {}

    def keep(name, a, h):
        seen[name], outputs[name] = a[0], h

    for n, m in layers.items():
        m.register_forward_hook(lambda m, a, h, n=n: keep(n, a, h))
    for sample, label in zip(x, y, strict=True):
        logits = model(sample[None])
        p = logits.softmax(1)[0].detach()
        draws = [(1.0, int(label))] if matrix == "grad_moment" else [(float(q), c) for c, q in enumerate(p)]
        for n, m in layers.items():
            if isinstance(m, nn.Conv2d):
                rows = F.unfold(seen[n], m.kernel_size, padding=m.padding, stride=m.stride)[0].T
            else:
                rows = seen[n]
            if m.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1).double()], dim=1)
            inputs[n] = inputs[n] + rows.T @ rows / len(x)
            for weight, c in draws:
                loss = F.cross_entropy(logits, torch.tensor([c]))
                parts = torch.autograd.grad(loss, [outputs[n], *m.parameters()], retain_graph=True)
                g = parts[0][0].flatten(1).T if parts[0].ndim == 4 else parts[0]
                grads[n] = grads[n] + weight * g.T @ g / (len(g) * len(x))
                whole = torch.cat([p.flatten() for p in parts[1:]])
                exact[n] = exact[n] + weight * torch.outer(whole, whole) / len(x)
    return {n: (exact[n].detach(), torch.kron(inputs[n], grads[n]).detach()) for n in layers}


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment"])
@pytest.mark.parametrize("samples", [3, 40])
def test_spectra_ratios_and_distances_are_those_of_the_dense_matrices(matrix, samples):
    model, (x, y) = network(), data(samples)
    report = kronecker_report(model, x, y, matrix)
    expected = dense(copy.deepcopy(model), x, y, matrix)
    assert list(report) == list(expected) == ["0", "2", "5"]
    for name, blocks in expected.items():
        a, b = (torch.linalg.eigvalsh(block).flip(0) for block in blocks)
        found = report[name]
        assert float((found.exact.eigenvalues - a).abs().max()) < 1e-12 * float(a[0])
        assert float((found.kronecker.eigenvalues - b).abs().max()) < 1e-12 * float(b[0])
        assert found.lambda_ratio == pytest.approx(float(a[0] / b[0]), rel=1e-10)
        assert found.relative_distance == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-9)
        known = int(((a > 1e-11 * a[0]) & (b > 1e-11 * b[0])).sum())
        assert found.log_distance == pytest.approx(float((a[:known] / b[:known]).log10().abs().max()), rel=1e-3)


def test_it_is_the_same_as_curvature_beside_measure():
    model, (x, y) = network(), data(12)
    report = kronecker_report(model, x, y, "grad_moment")
    measured = measure(model, (x, y), conv="patches", bias=True)
    for name, found in report.items():
        assert torch.equal(found.exact.eigenvalues, curvature(model, x, y, "grad_moment", name).eigenvalues)
        product = measured[name].positions * measured[name].fisher.lambda_max
        assert found.kronecker.lambda_max == pytest.approx(product, rel=1e-10)


def test_one_sample_with_one_position_makes_them_equal():
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    found = kronecker_report(model, *data(1), "grad_moment")["1"]
    assert found.lambda_ratio == pytest.approx(1.0, rel=1e-12)
    assert found.relative_distance < 1e-12
    assert found.log_distance < 1e-12


def test_grouped_layers_have_a_product_a_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)).double()
    found = kronecker_report(model, data(6)[0])
    assert found["0"].exact.dim == found["0"].kronecker.dim == 20
    assert found["0"].positions == 9


def test_what_is_left_out_is_named_and_the_table_says_all():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.up = nn.MultiheadAttention(4, 2, batch_first=True), nn.ConvTranspose1d(3, 3, 1)
            self.unused, self.aside, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            h = self.attention(x, x, x)[0]
            self.aside(h)
            return self.head(self.up(h).mean(1))

    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    report = kronecker_report(Net(), x)
    assert list(report) == ["head"]
    assert "inside nn.MultiheadAttention" in report.skipped["attention.in_proj"]
    assert "ConvTranspose1d" in report.skipped["up"]
    assert report.skipped["unused"] == "not called in the forward pass, or only without gradients"
    assert "no gradient" in report.skipped["aside"]
    with pytest.raises(KeyError, match="no layer 'unused': not called"):
        report["unused"]
    text = report.table()
    line = next(line for line in text.splitlines() if line.startswith("head"))
    assert f"{report['head'].lambda_ratio:.3g}" in line
    assert "skipped up: the exact block of ConvTranspose1d is not available" in text
    assert "used otherwise than by its own call" in report.skipped["attention.out_proj"]


def test_wrong_arguments_are_explained():
    with pytest.raises(ValueError, match="matrix must be one of 'fisher', 'grad_moment', got 'hessian'"):
        kronecker_report(network(), *data(3), "hessian")
    with pytest.raises(ValueError, match="'grad_moment' needs targets y; 'fisher' does without"):
        kronecker_report(network(), data(3)[0], None, "grad_moment")


def test_a_layer_that_sees_zeros_alone_has_a_row():
    report = kronecker_report(nn.Sequential(nn.Linear(4, 3, bias=False)), torch.zeros(5, 4))
    assert report["0"].exact.lambda_max == report["0"].kronecker.lambda_max == 0
    assert math.isnan(report["0"].lambda_ratio)
    assert math.isnan(report["0"].log_distance)
    assert "nan" in report.table()


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment"])
def test_a_report_of_no_layer_names_why(matrix):
    model = nn.Sequential(weight_norm(nn.Linear(5, 3)))
    report = kronecker_report(model, torch.randn(4, 5), torch.arange(4) % 3, matrix)
    assert len(report) == 0
    assert report.skipped == {"0": "the exact block of a layer whose weight is computed is not available"}
    assert "skipped 0" in report.table()


def test_a_block_too_large_is_skipped_and_the_others_are_there(monkeypatch):
    monkeypatch.setattr(costs, "LARGEST", 80)
    report = kronecker_report(network(), *data(60))
    assert list(report) == ["0", "2"]
    assert report.skipped["5"] == "its exact block is too large to decompose (side 111); pass fewer samples"


def test_the_announcement_names_what_the_report_takes(monkeypatch):
    monkeypatch.setattr(costs, "products_a_second", lambda *_: 1.0)
    with pytest.warns(UserWarning, match=r"block='<layer>' \(of a report layers=\['<layer>'\]\) cost less"):
        kronecker_report(network(), *data(6), layers=["5"])
