"""float32 products, added up in float64: how far they are from numpy's in float64, and the noise said of them."""

import numpy as np
import pytest
import torch

from condzoo.probe.arithmetic import SAFETY, float32_noise, gram_float32, plain_convolutions, plain_products
from condzoo.probe.moments import RunningMoment

KINDS = {
    "even": lambda g: torch.randn(g, generator=torch.Generator().manual_seed(0)),
    "positive": lambda g: torch.randn(g, generator=torch.Generator().manual_seed(1)).relu(),
    "nearly constant": lambda g: 1 + 0.01 * torch.randn(g, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("pieces", "dim", "rows"), [(1, 8, 40), (7, 16, 9), (12, 5, 300), (128, 16, 64), (1000, 8, 4)])
def test_the_error_is_under_the_noise_said_of_it(kind, groups, pieces, dim, rows):
    columns = KINDS[kind]((pieces, groups, dim, rows))
    found = gram_float32(columns)
    x = columns.double().numpy()
    exact = np.einsum("bgik,bgjk->gij", x, x)
    assert found.shape == (groups, dim, dim)
    assert found.dtype == torch.float64
    error = np.linalg.norm(found.numpy() - exact, ord=2, axis=(1, 2)).max()
    assert 0 < error < 0.8 * float32_noise(found, pieces) / SAFETY


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("autocast", [True, False])
def test_plain_products_are_float32_whatever_is_set_around_them_and_leave_it_as_it_was(setting, autocast):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with plain_products("cpu"):
                product = x @ x.T
            assert torch.is_autocast_enabled("cpu") is autocast
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert product.dtype == torch.float32
    assert float((product.double() - x.double() @ x.double().T).abs().max()) < 1e-4


@pytest.mark.parametrize("precision", ["auto", "fast"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e-18, 1e-12, 1e12, 1e19, 1e30])
def test_data_whose_squares_leave_float32_is_measured_all_the_same(magnitude, parts, precision):
    """A deep network without normalization shrinks or grows its signals by many decades."""
    x = torch.randn((240, 6), generator=torch.Generator().manual_seed(0))
    scaled = x * magnitude
    moment = RunningMoment()
    for part in scaled.split(240 // parts):
        moment.add(part.T[None, None], precision)
    expected = np.linalg.svd(scaled.double().numpy(), compute_uv=False) ** 2 / 240
    found = np.sort(np.linalg.eigvalsh(moment.decomposable()[0].numpy()))[::-1]
    assert moment.finite
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    if precision != "auto":  # which takes float64 for the smallest eigenvalue's sake, too
        assert moment.fast == (precision == "fast" and 1e-15 < magnitude < 1e15)
    elif not 1e-15 < magnitude < 1e15:
        assert not moment.fast


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["auto", "fast", "float64"])
def test_data_that_is_not_finite_is_known_from_data_whose_squares_are_not(bad, precision):
    x = torch.full((40, 4), 1e25)
    x[3, 2] = bad
    moment = RunningMoment()
    moment.add(x.T[None, None], precision)
    assert not moment.finite


def test_convolutions_of_a_gpu_are_asked_for_without_tf32(monkeypatch):
    """No GPU here: what cuDNN is told, and that it is as before after it."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    before = torch.backends.cudnn.allow_tf32
    with plain_convolutions("cuda"):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    with plain_convolutions("cpu"):
        assert torch.backends.cudnn.allow_tf32 == before
