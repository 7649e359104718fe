"""float32 products, added up in float64: how far they are from numpy's in float64, and the noise said of them."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from condzoo.probe import arithmetic, measure
from condzoo.probe.arithmetic import (
    SAFETY,
    float32_noise,
    gram_float32,
    gram_float64,
    plain_convolutions,
    plain_products,
)
from condzoo.probe.moments import RunningMoment
from tests.probe.on_gpus import OnGPU

pytestmark = pytest.mark.usefixtures("products")

KINDS = {
    "even": lambda g: torch.randn(g, generator=torch.Generator().manual_seed(0)),
    "positive": lambda g: torch.randn(g, generator=torch.Generator().manual_seed(1)).relu(),
    "nearly constant": lambda g: 1 + 0.01 * torch.randn(g, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("pieces", "dim", "rows"),
    [
        *((1, 8, 40), (7, 16, 9), (12, 5, 300), (128, 16, 64), (1000, 8, 4)),
        *((1, 3, 1_000_000), (64, 1, 50_176), (2, 3, 50_176)),  # which BLAS adds in one chain
    ],
)
def test_the_error_is_under_the_noise_said_of_it(kind, groups, pieces, dim, rows):
    columns = KINDS[kind]((pieces, groups, dim, rows))
    found = gram_float32(columns)
    x = columns.double().numpy()
    exact = np.einsum("bgik,bgjk->gij", x, x)
    assert found.shape == (groups, dim, dim)
    assert found.dtype == torch.float64
    error = np.linalg.norm(found.numpy() - exact, ord=2, axis=(1, 2)).max()
    assert 0 < error < 0.8 * float32_noise(found, pieces) / SAFETY


@pytest.mark.parametrize("precision", ["auto", "fast"])
@pytest.mark.parametrize("dim", [2, 16])
def test_rows_that_repeat_are_right_or_unknown(dim, precision):
    """Learned queries, positions, duplicated examples: the rounding of one piece's product is that of all."""
    rows, pieces = 64, 1000
    known = []
    for seed, times, averaged in itertools.product(range(3), (1.3, 3.0), (dim, pieces)):
        smallest = times * arithmetic.FLOAT32_PRODUCT / averaged**0.5  # above the floor of so many pieces
        random = np.random.default_rng(seed)
        left, right = (np.linalg.qr(random.standard_normal((n, dim)))[0] for n in (rows, dim))
        x = ((left * np.sqrt(np.geomspace(1, smallest, dim) * rows)) @ right.T).astype(np.float32)
        singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        batch = torch.from_numpy(np.tile(x, (pieces, 1))), torch.zeros(pieces * rows, dtype=torch.long)
        found = measure(nn.Linear(dim, 2), batch, precision=precision)[""].input
        if found.status() == "ok":
            known.append(averaged)
            assert found.condition_number() == pytest.approx((singular[0] / singular[-1]) ** 2, rel=0.05)
    assert known.count(dim) >= 3


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


newer = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch sets TF32 by operation since 2.9"
)
SETTINGS = {
    "all": torch.backends,
    "CUDA": torch.backends.cudnn,
    "products of CUDA": torch.backends.cuda.matmul,
    "products of CPUs": torch.backends.mkldnn.matmul,
}


def readings():
    """The setting of each operation and backend, under each that is set for all of them."""
    found, own = [], torch.backends.fp32_precision
    for general in ("none", "ieee", "tf32"):
        torch.backends.fp32_precision = general
        backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
        found += [x.fp32_precision for x in (*backends, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)]
    torch.backends.fp32_precision = own
    return own, found


@newer
@pytest.mark.parametrize("where", [*SETTINGS, "products, legacy", "products of CUDA, legacy"])
def test_tf32_of_the_newer_settings_is_off_in_products_and_as_it_was_after_them(kit, where):
    batch = kit.images(dtype=torch.float32)
    expected = measure(kit.build("conv"), kit.images(), conv="patches")
    for op in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        op.fp32_precision = op.fp32_precision  # as long as it was never set it is TF32 by a default that no setting is
    try:
        if where in SETTINGS:
            SETTINGS[where].fp32_precision = "tf32"
        elif where == "products of CUDA, legacy":
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision("high")
        before = readings()
        for device in ("cpu", "cuda"):
            with plain_products(device), plain_convolutions(device):
                assert torch.backends.cuda.matmul.fp32_precision in ("none", "ieee") or device == "cpu"
                assert torch.backends.cudnn.conv.fp32_precision in ("none", "ieee") or device == "cpu"
                assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee") or device == "cuda"
            assert readings() == before
        found = measure(kit.build("conv", torch.float32), batch, conv="patches")
        assert readings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for setting in SETTINGS.values():
            setting.fp32_precision = "none"
    for name, layer in expected.items():
        assert found[name].input.lambda_max == pytest.approx(layer.input.lambda_max, rel=1e-3)


def test_torch_without_the_newer_settings_is_told_by_its_older_ones(monkeypatch):
    monkeypatch.setattr(arithmetic, "_precision", arithmetic._precision_before)
    monkeypatch.setattr(arithmetic, "_set_precision", None)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        with plain_products("cpu"), plain_convolutions("cuda"):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])


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


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("magnitude", [1e-170, 1e-154, 1e155, 1e170])
def test_float64_data_whose_squares_leave_float64_is_left_out_with_that_reason(magnitude, rows):
    x = torch.randn((rows, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(8, 3).double()
    found = measure(model, (x * magnitude, torch.arange(rows) % 3))
    assert found.skipped[""].startswith("the squares of its input leave float64's range")
    assert "forward" not in found.first_nonfinite


@pytest.mark.parametrize("magnitude", [1e-151, 1e151])
def test_float64_data_whose_squares_stay_is_measured(magnitude):
    x = torch.randn((64, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, y = nn.Linear(8, 3).double(), torch.arange(64) % 3
    expected, found = (measure(model, (scale * x, y))[""].input for scale in (1.0, magnitude))
    assert found.condition_number() == pytest.approx(expected.condition_number(), rel=1e-9)
    assert found.lambda_max == pytest.approx(expected.lambda_max * magnitude**2, rel=1e-9)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("first", [0.0, 1e-170])
def test_a_coordinate_is_always_0_where_the_data_is_and_not_its_square_alone(first, rows):
    x = torch.randn((rows, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] *= first
    x[-1] = x[-2]  # else 4 rows have the rank that they can have, and nothing is looked for
    found = measure(nn.Linear(8, 3).double(), (x, torch.arange(rows) % 3))[""].input
    assert (found.nulls, found.null_reason) == ((1, "1: coordinates always 0") if first == 0 else (0, ""))
    assert found.condition_number() == np.inf


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["auto", "fast", "float64"])
def test_data_that_is_not_finite_is_known_from_data_whose_squares_are_not(bad, precision):
    x = torch.full((40, 4), 1e25)
    x[3, 2] = bad
    moment = RunningMoment()
    moment.add(x.T[None, None], precision)
    assert not moment.finite


@newer
def test_convolutions_of_a_gpu_are_asked_for_without_tf32():
    """No GPU here: what cuDNN is told, and that it is as before after it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.conv.fp32_precision
    with plain_convolutions("cuda"):
        assert torch.backends.cudnn.conv.fp32_precision in ("none", "ieee")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.conv.fp32_precision) == before
    with plain_convolutions("cpu"):
        assert torch.backends.cudnn.conv.fp32_precision == before[1]


def test_a_gpu_multiplies_more_at_a_time_in_float64(monkeypatch, torch_products):
    """A CPU's slices stay in its cache; a GPU would be done with one before the next has been started."""
    multiply, parts = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *args: parts.append(type(args[0])) or multiply(*args))
    columns = torch.randn(64, 1, 8, 1024, generator=torch.Generator().manual_seed(0))
    here, there = gram_float64(columns), gram_float64(OnGPU(columns))
    assert parts == [torch.Tensor] * 4 + [OnGPU]
    assert torch.allclose(there.cpu(), here, rtol=1e-13)
    parts.clear()
    gram_float64(OnGPU(torch.ones(5000, 1, 64, 1)))  # whose products are 64 times as many numbers
    assert len(parts) == 2
