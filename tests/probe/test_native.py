"""The compiled sums of products: against numpy in longer numbers, however the data lie; and what becomes of them where
they cannot be compiled."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from condzoo.probe import measure, native
from condzoo.probe.arithmetic import SAFETY, float32_noise, gram_float32, gram_float64
from condzoo.probe.moments import RunningMoment

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler with OpenMP")

SHAPES = [
    *(
        (128, 1, 16, 100),
        (5, 1, 33, 70),
        (3, 2, 128, 300),
        (1, 1, 1, 1),
        (2, 3, 17, 1),
        (700, 1, 10, 1),
        (1, 1, 3, 5000),
    ),
    *((9, 64, 1, 50), (4, 7, 4, 33), (300, 1, 64, 3)),
]
LAYOUTS = {
    "images": lambda x: x,
    "channels_last": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "rows first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "pieces last": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "every other row": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "one piece, again and again": lambda x: x[:1].expand(x.shape),
    "a part": lambda x: torch.cat([x, x, x], dim=2)[:, :, x.shape[2] : 2 * x.shape[2]],
}


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(columns):
    """In numbers of 64 bits of mantissa, and the same sum of absolute values, which bounds what rounding does."""
    b, g, d, k = columns.shape
    x = columns.double().numpy().transpose(1, 2, 0, 3).reshape(g, d, b * k).astype(np.longdouble)
    return x @ x.transpose(0, 2, 1), abs(x) @ abs(x).transpose(0, 2, 1)


def error(found, columns):
    """Relative to the sum of absolute values, the largest of all."""
    of, largest = exact(columns)
    return float((abs(found.numpy() - of) / largest).max())


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_numpys_sum_however_the_data_lie(shape, layout, dtype):
    columns = LAYOUTS[layout](drawn(shape).to(dtype))
    found = native.gram(columns)
    assert (found.dtype, found.shape) == (torch.float64, (*shape[1:3], shape[2]))
    assert error(found, columns) < 4e-16 * (1 + (shape[0] * shape[3]) ** 0.5)
    assert torch.equal(found, found.mT)


@given(
    *(st.integers(1, n) for n in (40, 9, 45, 600)),
    st.permutations(range(4)),
    st.sampled_from(list(native.TYPES)),
    st.integers(1, 3),
)
def test_it_is_numpys_sum_in_any_order_and_with_any_number_of_threads(b, g, d, k, order, dtype, threads):
    k = max(1, k // (b * g))
    columns = drawn((b, g, d, k)).to(dtype).permute(order).contiguous().permute([order.index(i) for i in range(4)])
    before, worth = torch.get_num_threads(), native.WORTH_THREADS
    try:
        torch.set_num_threads(threads)
        native.WORTH_THREADS = 0
        found = native.gram(columns)
    finally:
        torch.set_num_threads(before)
        native.WORTH_THREADS = worth
    assert error(found, columns) < 4e-16 * (1 + (b * k) ** 0.5)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "again" not in layout])
@pytest.mark.parametrize("kind", [torch.relu, lambda x: 1 + 0.01 * x, lambda x: x], ids=["positive", "alike", "even"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] * shape[3] > 1], ids=str)
def test_float32_products_leave_no_more_noise_than_is_said_of_them(shape, kind, layout):
    """Of rows that repeat, `rounding.holds` sees to it: test_arithmetic.py."""
    columns = LAYOUTS[layout](kind(drawn(shape)))
    found = gram_float32(columns)
    of, _ = exact(columns)
    off = np.linalg.norm((found.numpy() - of).astype(float), ord=2, axis=(1, 2)).max()
    assert 0 < off < 0.8 * float32_noise(found, shape[0]) / SAFETY


def test_float32_products_are_of_float32_numbers():
    columns = torch.full((1, 1, 2, 8), 1e25)
    assert torch.isinf(native.gram(columns, torch.float32)).all()
    assert torch.allclose(native.gram(columns), torch.tensor(8e50, dtype=torch.float64), rtol=1e-6)
    assert torch.equal(gram_float32(columns), native.gram(columns, torch.float32))
    assert torch.equal(gram_float64(columns), native.gram(columns))


@pytest.mark.parametrize("layout", ["images", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_own_coordinate_alone(value, layout):
    columns = drawn((4, 1, 9, 50))
    before = native.gram(LAYOUTS[layout](columns))
    columns[2, 0, 5, 7] = value
    found = native.gram(LAYOUTS[layout](columns))
    others = torch.arange(9) != 5
    assert not torch.isfinite(found[0, 5]).any()
    assert torch.equal(found[0][others][:, others], before[0][others][:, others])


def test_no_rows_add_up_to_nothing():
    assert torch.equal(native.gram(torch.ones(0, 2, 3, 5)), torch.zeros(2, 3, 3, dtype=torch.float64))
    assert torch.equal(native.gram(torch.ones(4, 2, 3, 0)), torch.zeros(2, 3, 3, dtype=torch.float64))


def test_twice_the_same_is_the_same_to_the_last_bit():
    columns = drawn((64, 1, 32, 500))
    assert torch.equal(native.gram(columns), native.gram(columns.clone()))


class Wrapped(torch.Tensor):
    pass


def test_it_takes_what_it_can_read():
    columns = drawn((2, 1, 4, 8))
    assert native.takes(columns)
    for other in (
        drawn((2, 1, native.WIDEST + 1, 8)),
        columns.half(),
        columns.as_subclass(Wrapped),
        columns.to("meta"),
        drawn((2, 1, 0, 8)),
    ):
        assert not native.takes(other)
    seen = []
    torch.func.vmap(lambda x: seen.append(native.takes(x)) or x)(columns[None])
    torch.func.grad(lambda x: seen.append(native.takes(x)) or x.sum())(columns)
    assert seen == [False, False]


def test_auto_multiplies_in_float64_at_once_where_that_takes_no_longer():
    columns, auto, narrow = drawn((16, 1, 8, 20)), RunningMoment(), RunningMoment()
    auto.add(columns, "auto")
    assert not auto.fast
    assert torch.equal(auto.total, native.gram(columns))
    narrow.add(columns, "fast")
    assert narrow.fast
    assert torch.equal(narrow.total, native.gram(columns, torch.float32))
    wide = RunningMoment()
    wide.add(drawn((16, 1, native.WIDEST + 1, 20)), "auto")
    assert wide.fast


@pytest.fixture
def compiling(tmp_path, monkeypatch):
    """An empty cache, and a compiler that counts its calls. Gives the cache and the file they are counted in."""
    counted, compiler = tmp_path / "calls", tmp_path / "my cc"
    compiler.write_text(f'#!/bin/sh\necho call >> "{counted}"\nexec cc "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", f"'{compiler}'")
    monkeypatch.setenv("CONDZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native", counted


def loaded():
    """As a new process would have it."""
    return native.library.__wrapped__()


def test_it_is_compiled_once_and_kept(compiling):
    cache, calls = compiling
    assert all(isinstance(loaded(), ctypes.CDLL) for _ in range(3))
    assert calls.read_text() == "call\n"
    assert [file.suffix for file in cache.iterdir()] == [".so"]


def test_another_compiler_source_or_processor_compiles_anew(compiling, monkeypatch, tmp_path):
    cache, calls = compiling
    loaded()
    monkeypatch.setattr(native, "_processor", lambda: "another")
    loaded()
    monkeypatch.setenv("CC", os.environ["CC"] + " -g")
    loaded()
    sources = [tmp_path / source.name for source in native.SOURCES]
    for file, source in zip(sources, native.SOURCES, strict=True):
        file.write_bytes(source.read_bytes() + b"\n")
    monkeypatch.setattr(native, "SOURCES", sources)
    loaded()
    assert calls.read_text() == "call\n" * 4
    assert len(list(cache.iterdir())) == 4


def test_a_broken_file_in_the_cache_is_replaced(compiling):
    cache, calls = compiling
    loaded()
    (file,) = cache.iterdir()
    file.write_bytes(b"")
    assert loaded() is not None
    assert calls.read_text() == "call\n" * 2
    assert file.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_to_is_done_without(compiling, tmp_path):
    calls = compiling[1]
    (tmp_path / "cache").write_text("a file in the folder's place")
    assert loaded() is not None
    assert loaded() is not None
    assert calls.read_text() == "call\n" * 2


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", "sh -c 'echo cc: no >&2; exit 1'"], ids=str)
def test_without_a_compiler_torch_multiplies(compiler, compiling, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    assert loaded() is None


def test_a_compiler_that_never_ends_is_given_up(compiling, monkeypatch):
    monkeypatch.setenv("CC", "sh -c 'sleep 60'")
    monkeypatch.setattr(native, "PATIENCE", 0.1)
    assert loaded() is None


def test_wrong_sums_are_not_used(compiling, monkeypatch, tmp_path):
    sources = [tmp_path / source.name for source in native.SOURCES]
    for file, source in zip(sources, native.SOURCES, strict=True):
        file.write_text(source.read_text().replace("+= a[row * side + i] * y[j]", "-= a[row * side + i] * y[j]"))
    monkeypatch.setattr(native, "SOURCES", sources)
    assert loaded() is None


@pytest.mark.parametrize("switch", ["-mno-avx512f", "-mno-avx"])
def test_processors_with_shorter_vectors_add_up_the_same(switch, compiling, monkeypatch):
    monkeypatch.setenv("CC", os.environ["CC"] + f" {switch}")
    compiled = loaded()
    if compiled is None:
        pytest.skip(f"this compiler knows no {switch}")
    for shape in SHAPES:
        for layout in LAYOUTS.values():
            columns = layout(drawn(shape))
            found = native._gram(compiled, columns, torch.float64)
            assert error(found, columns) < 4e-16 * (1 + (shape[0] * shape[3]) ** 0.5)


def test_it_can_be_switched_off(compiling, monkeypatch):
    monkeypatch.setenv("CONDZOO_NATIVE", "0")
    assert loaded() is None
    assert not compiling[1].exists()


def test_a_process_that_has_it_switched_off_measures_the_same(tmp_path):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), drawn((16, 3, 8, 8))
    torch.save((model, batch), tmp_path / "case.pt")
    script = (
        "import sys, torch; from condzoo.probe import measure, native; assert native.library() is None;"
        "model, batch = torch.load(sys.argv[1], weights_only=False);"
        "found = measure(model, (batch, torch.arange(16) % 4), precision='float64')['0'];"
        "torch.save((found.input.eigenvalues, found.output_grad.eigenvalues), sys.argv[1])"
    )
    given = {**os.environ, "CONDZOO_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "case.pt"], check=True, env=given)
    here = measure(model, (batch, torch.arange(16) % 4), precision="float64")["0"]
    there = torch.load(tmp_path / "case.pt", weights_only=False)
    for ours, theirs in zip((here.input.eigenvalues, here.output_grad.eigenvalues), there, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13 * ours.max())


def test_the_cache_is_the_users_unless_said_otherwise(monkeypatch):
    monkeypatch.setenv("CONDZOO_CACHE", "~/zoo")
    monkeypatch.setenv("HOME", "/home/me")
    assert native._cache_folder() == Path("/home/me/zoo/native")
    monkeypatch.delenv("CONDZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert native._cache_folder() == Path("/fast/condzoo/native")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native._cache_folder() == Path("/home/me/.cache/condzoo/native")


def test_a_default_device_does_not_reach_it(compiling):
    torch.set_default_device("meta")
    try:
        assert loaded() is not None
    finally:
        torch.set_default_device(None)
