"""`kappa=False`: the largest eigenvalues of the full spectra and nothing that was not computed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condzoo.probe import Conditioning, KroneckerSpectrum, Probe, finishing, measure, record_columns
from condzoo.probe.spectra import from_blocks


@pytest.fixture(params=[0, 10**6], ids=["lanczos", "decomposed"])
def _both_ways(request, monkeypatch):
    monkeypatch.setattr(finishing, "DECOMPOSED", request.param)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "tokens"])
@pytest.mark.parametrize("samples", [3, 40])
def test_it_is_the_largest_eigenvalue_of_the_full_spectrum(kit, name, samples):
    model, batch = kit.build(name), kit.images(samples)
    full, tops = (measure(model, batch, kappa=kappa) for kappa in (True, False))
    assert list(full) == list(tops)
    for layer in full:
        for side in ("input", "output_grad"):
            a, b = getattr(full[layer], side), getattr(tops[layer], side)
            assert b.lambda_max == pytest.approx(a.lambda_max, rel=1e-8)
            assert (b.dim, b.computed, b.rows) == (a.dim, 1, a.rows)
            assert b.eigenvalues.numel() == (1 if a.blocks is None else len(a.blocks))
            if a.blocks is not None:
                assert torch.allclose(b.blocks[:, 0], a.blocks[:, 0], rtol=1e-8)
        assert tops[layer].fisher.lambda_max == pytest.approx(full[layer].fisher.lambda_max, rel=1e-8)
        assert tops[layer].fisher.dim == full[layer].fisher.dim
        assert tops[layer].weight == full[layer].weight


def test_what_was_not_computed_is_said_everywhere(kit, tmp_path):
    found = measure(kit.build("conv"), kit.images(40), kappa=False)
    for s in (found["0"].output_grad, found["2"].input, found["0"].fisher):
        assert math.isnan(s.condition_number(0.5))
        assert (s.status(0.5), s.status()) == ("not computed", "not computed")
    s = found["0"].output_grad
    assert math.isnan(s.at_least())
    assert math.isnan(s.complement_condition_number())
    assert (s.condition_number(1e-3), s.status(1e-3)) == (1.0, "ok")
    found.to_json(tmp_path / "c.json")
    again = Conditioning.from_json(tmp_path / "c.json")
    assert again.kappa is False
    assert [getattr(again["2"].input, k) for k in ("dim", "computed", "size")] == [3 * 2, 1, 6]
    assert math.isnan(record_columns([again])["input_kappa50"][0])
    assert "lambda_max only" in again.table()
    line = next(line for line in again.table().splitlines() if line.startswith("0 "))
    assert line.split().count("-") == 4
    again.plot(tmp_path / "c.png")


def test_a_probe_takes_it_too(kit):
    model, (x, y) = kit.build("residual", torch.float32), kit.images(dtype=torch.float32)
    expected = measure(model, (x, y), kappa=False)
    with Probe(model, kappa=False) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    assert (probe.latest.kappa, probe.latest.precision) == (False, "fast")
    for name, layer in expected.items():
        assert probe.latest[name].input.lambda_max == pytest.approx(layer.input.lambda_max, rel=1e-6)


def test_large_moments_are_not_decomposed(monkeypatch):
    sizes = []
    plain = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: sizes.append(m.shape[-1]) or plain(m))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 300), nn.ReLU(), nn.Linear(300, 3))
    batches = [(torch.randn(400, 600), torch.randint(3, (400,))) for _ in range(2)]
    few = measure(model, [(x[:150], y[:150]) for x, y in batches], kappa=False)["0"].input  # 300 vectors of 600
    many = measure(model, batches, kappa=False)["0"].input
    assert max(sizes) <= 300
    for found, rows in ((few, [x[:150] for x, _ in batches]), (many, [x for x, _ in batches])):
        x = torch.cat(rows).double()
        assert found.lambda_max == pytest.approx(float(torch.linalg.svdvals(x)[0] ** 2 / len(x)), rel=1e-6)


def test_where_lanczos_does_not_converge_the_moment_is_decomposed(monkeypatch):
    monkeypatch.setattr(finishing, "LANCZOS", 0.0)
    monkeypatch.setattr(finishing, "DECOMPOSED", 0)
    torch.manual_seed(0)
    model, batch = nn.Linear(30, 3).double(), (torch.randn(90, 30).double(), torch.randint(3, (90,)))
    assert measure(model, batch, kappa=False)[""].input.lambda_max == pytest.approx(
        measure(model, batch)[""].input.lambda_max, rel=1e-13
    )


def test_a_large_kroneckers_quantiles_form_no_products(monkeypatch):
    """2048 x 2048: 4 million products, 34 MB; the search needs one row of each factor at a time."""
    monkeypatch.setattr(torch, "outer", lambda *_: pytest.fail("the products were formed"))
    a, b = (torch.logspace(0, -low, 2048, dtype=torch.float64)[None] for low in (3, 5))
    found = KroneckerSpectrum(from_blocks(a, 1e-14), from_blocks(b, 1e-14))
    products = (a[0][:, None] * b[0]).flatten().sort(descending=True).values
    for p in (0.001, 0.1, 0.5, 0.9, 1.0):
        j = math.ceil(p * 2048**2 - 1e-9)
        assert found.condition_number(p) == pytest.approx(1 / float(products[j - 1]), rel=1e-12)
    assert (found.rank, found.dim) == (2048**2, 2048**2)
