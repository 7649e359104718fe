"""Condition numbers, statuses and the Kronecker product's spectrum."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from condzoo.probe import KroneckerSpectrum, condition_number, kronecker, spectrum
from condzoo.probe.spectra import Spectrum, from_blocks


@given(st.integers(1, 60), st.integers(1, 100))
@example(25, 28)  # 0.28 * 25 is 7.000000000000001 in floating point
@settings(max_examples=60, deadline=None)
def test_kappa_spans_the_ceiling_of_p_times_d(dim, percent):
    values = torch.arange(dim, 0, -1).double()
    j = -(-percent * dim // 100)  # exact ceiling in integers
    assert condition_number(values, p=percent / 100) == pytest.approx(dim / (dim - j + 1), rel=1e-15)


def test_condition_number_takes_any_order_and_container():
    for values in ([1.0, 4.0, 2.0], np.array([4.0, 2.0, 1.0]), torch.tensor([2, 1, 4]), (1, 2, 4)):
        assert condition_number(values) == 4.0
    assert condition_number([1e9, 1.0]) == 1e9, "Python's numbers are float64"


def test_condition_number_rejects_a_percentage():
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\], got 80.0; for 80 percent write p=0.8"):
        condition_number(torch.ones(4).double(), p=80.0)


@pytest.mark.parametrize("p", [0.0, -0.5, 1.0001, math.nan])
def test_condition_number_rejects_what_is_no_fraction(p):
    with pytest.raises(ValueError, match="p must be a fraction"):
        condition_number(torch.ones(4).double(), p=p)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.empty(0), "non-empty vector"),
        (torch.eye(3), r"got shape \[3, 3\]; for a matrix call condzoo.spectrum"),
        (torch.tensor([1.0, math.nan]), "NaN or Inf"),
    ],
)
def test_condition_number_rejects_what_is_no_spectrum(values, message):
    with pytest.raises(ValueError, match=message):
        condition_number(values)


@pytest.mark.parametrize("last", [0.0, -1e-9, 1e-17])
def test_a_zero_negative_or_round_off_eigenvalue_gives_infinity(last):
    assert condition_number([1.0, 0.5, last]) == math.inf
    assert condition_number([1.0, 0.5, last], p=0.6) == 2.0


def test_spectrum_of_a_matrix_equals_numpys():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    moment = x.T @ x / 50
    found = spectrum(moment, rows=50)
    assert np.allclose(found.eigenvalues, np.linalg.eigvalsh(moment.numpy())[::-1], rtol=1e-12)
    assert (found.rank, found.dim, found.status(), found.rows) == (6, 6, "ok", 50)
    assert found.condition_number() == pytest.approx(np.linalg.cond(moment.numpy()), rel=1e-9)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.ones(2, 3), r"must be \[d, d\], \[groups, d, d\] or eigenvalues \[d\], got shape \[2, 3\]"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), r"not symmetric; pass X.T @ X / n"),
        (torch.full((2, 2), math.inf), "NaN or Inf"),
    ],
)
def test_spectrum_rejects_other_things(moment, message):
    with pytest.raises(ValueError, match=message):
        spectrum(moment)


def test_status_says_why_kappa_is_not_known():
    values = torch.tensor([[8.0, 4.0, 2.0, 1e-9]]).double()
    bound = from_blocks(values, 1e-6, 100)
    assert (bound.status(), bound.condition_number(), bound.at_least()) == ("bound", math.inf, 8e6)
    assert (bound.status(0.75), bound.condition_number(0.75), bound.at_least(0.75)) == ("ok", 4.0, 4.0)
    null = from_blocks(values, 1e-6, 100, nulls=1)
    assert (null.status(), null.complement_condition_number(), null.rank) == ("structural null", 4.0, 3)
    few = from_blocks(values, 1e-6, 3)
    assert (few.status(), few.complement_condition_number()) == ("rank-limited", 4.0)


def test_eigenvalues_are_never_negative_and_descend():
    found = from_blocks(torch.tensor([[1.0, -1e-18], [3.0, 0.5]]), 1e-12)
    assert found.eigenvalues.tolist() == [3.0, 1.0, 0.5, 0.0]
    assert found.blocks.tolist() == [[1.0, 0.0], [3.0, 0.5]]
    assert found.eigenvalues.dtype == torch.float64


def pair(n, m, groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand((groups, d), generator=generator).double() ** 4 + 1e-6 for d in (n, m))
    return a, b, KroneckerSpectrum(from_blocks(a, 1e-12), from_blocks(b, 1e-12))


@pytest.mark.parametrize("groups", [1, 3])
def test_kronecker_spectrum_is_that_of_the_dense_product(groups):
    a, b, found = pair(4, 5, groups)
    dense = torch.block_diag(*[torch.kron(torch.diag(x), torch.diag(y)) for x, y in zip(a, b, strict=True)])
    expected = torch.linalg.eigvalsh(dense).flip(0)
    assert torch.allclose(found.eigenvalues, expected, rtol=1e-12)
    assert found.lambda_max == pytest.approx(float(expected[0]), rel=1e-12)
    for p in (0.1, 0.33, 0.5, 1.0):
        assert found.condition_number(p) == pytest.approx(condition_number(expected, p), rel=1e-9)


def test_proposition_1_lambda_max_and_kappa_multiply():
    _, _, found = pair(7, 6)
    x, g = found.input, found.output_grad
    assert found.lambda_max == pytest.approx(x.lambda_max * g.lambda_max, rel=1e-14)
    assert found.condition_number() == pytest.approx(x.condition_number() * g.condition_number(), rel=1e-12)


@pytest.mark.parametrize("p", [0.001, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_search_without_forming_the_products_finds_the_same(p, groups, monkeypatch):
    _, _, found = pair(40, 30, groups)
    direct = found.condition_number(p)
    monkeypatch.setattr(kronecker, "DIRECT", 0)
    assert pair(40, 30, groups)[2].condition_number(p) == pytest.approx(direct, rel=1e-12)


def test_a_known_null_of_one_factor_leaves_the_rest_of_the_product_known():
    a = from_blocks(torch.tensor([[4.0, 2.0]]), 1e-9)
    softmax = from_blocks(torch.tensor([[3.0, 1.0, 1e-17]]), 1e-9, nulls=1)
    product = KroneckerSpectrum(a, softmax)
    assert (product.rank, product.condition_number(4 / 6)) == (4, 6.0)
    assert (product.condition_number(), product.status()) == (math.inf, "structural null")
    unknown = KroneckerSpectrum(a, from_blocks(torch.tensor([[3.0, 1.0, 1e-17]]), 0.9))
    assert unknown.noise_floor == pytest.approx(3.6)
    assert unknown.rank == 3  # 12, 6 and 4; 2 * 1 may be less than what 4 * noise hides
    assert unknown.status(4 / 6) == "bound"


def test_numpy_arrays_that_run_backwards_or_are_read_only_are_taken():
    values = np.linalg.eigvalsh(np.diag([4.0, 2.0, 1.0]))[::-1]
    assert condition_number(values) == 4.0
    matrix = np.diag([4.0, 2.0, 1.0])
    matrix.flags.writeable = False
    assert spectrum(matrix[::-1, ::-1]).condition_number() == 4.0
    assert spectrum(np.broadcast_to(values, (3,))).lambda_max == 4.0


def test_the_condition_number_of_a_kronecker_product_is_its_own():
    factors = [spectrum(torch.diag(torch.tensor(d).double())) for d in ([4.0, 2.0], [9.0, 3.0, 1.0])]
    fisher = KroneckerSpectrum(*factors)
    assert condition_number(fisher) == 18.0
    assert condition_number(fisher, p=0.5) == fisher.condition_number(0.5) == 36 / 12


def test_a_lower_bound_of_a_condition_number_is_never_under_one():
    noise = Spectrum(torch.tensor([1e-5, 0.0]).double(), noise_floor=1e-3, rows=4)  # lambda_max is noise, too
    assert (noise.status(0.5), noise.at_least(0.5)) == ("bound", 1.0)


@pytest.mark.parametrize("values", [torch.ones(3, dtype=torch.complex64), np.ones(3, dtype=complex)])
def test_complex_eigenvalues_are_one_error(values):
    for of in (condition_number, spectrum) if isinstance(values, np.ndarray) else (condition_number,):
        with pytest.raises(TypeError, match=r"must be real, got complex\d+; a symmetric matrix has real ones, which"):
            of(values)


def test_a_kronecker_product_says_what_kappa_is_at_least_and_whose_nulls_it_has():
    whole, known = from_blocks(torch.tensor([[4.0, 2.0]]), 0.0), from_blocks(torch.tensor([[3.0, 0.0]]), 0.01)
    null = from_blocks(torch.tensor([[3.0, 0.0]]), 0.01, nulls=1, null_reason="1: coordinates always 0")
    product = KroneckerSpectrum(whole, known)
    assert product.at_least(0.5) == product.condition_number(0.5) == 2.0
    assert product.at_least() == pytest.approx(4 * 3 / (0.01 * 4))
    assert product.null_reason == ""
    assert KroneckerSpectrum(whole, null).at_least() == math.inf
    assert KroneckerSpectrum(whole, null).null_reason == "output_grad 1: coordinates always 0"
