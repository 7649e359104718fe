"""The sums of `gram.c`, compiled for this machine when they are first needed, as torch.compile and Triton do theirs.

The compiled library is kept in the user's cache. Where there is no C compiler, or CONDZOO_NATIVE is 0, there is none,
and torch's own products take its place: slower, and in float32 only where they are worth it.
Shapes: b pieces, g groups, d coordinates, k rows a piece.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

WIDEST = 128  # coordinates, of which it takes as long as float32 products of BLAS (128 maps of 8 x 8, two cores)
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
CHAIN = 16  # float32 products that gram.h adds one after another, whose roundings average out even if rows are alike
WORTH_THREADS = 1 << 19  # products; of as many, one thread takes as long as two
SOURCES = [Path(__file__).with_name(name) for name in ("gram.c", "gram.h")]
OPTIONS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-march=native"]
PATIENCE = 120  # seconds for a compiler


class Columns(ctypes.Structure):
    """gram.c's `struct columns`."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("type", "size", "pieces", "groups", "dim", "rows")),
        *((name, ctypes.c_int64) for name in ("next_piece", "next_group", "next_dim", "next_row")),
    ]


def takes(columns: Float[Tensor, "b g d k"]) -> bool:
    """Whether `gram` can multiply these, and does so more quickly than torch."""
    return (
        0 < columns.shape[2] <= WIDEST
        and columns.dtype in TYPES
        and columns.is_cpu
        and type(columns) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(columns)
        and library() is not None
    )


def gram(columns: Float[Tensor, "b g d k"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "g d d"]:
    """sum over pieces and rows of x x^T, by products in float64 or float32, whose sums over 256 rows are in float64.

    It does not depend on the number of threads by more than the order of these sums in float64.
    """
    compiled = library()
    assert compiled is not None
    return _gram(compiled, columns, dtype)


def _gram(compiled: ctypes.CDLL, columns: Float[Tensor, "b g d k"], dtype: torch.dtype) -> Float[Tensor, "g d d"]:
    if columns.shape[3] == 1:
        columns = columns.permute(3, 1, 2, 0)
    if columns.stride(3) != 1 and (columns.shape[1] > 1 or columns.stride(2) != 1):
        columns = columns.contiguous()  # neither rows nor coordinates lie side by side: each read would miss the cache
    b, g, d, k = columns.shape
    threads = torch.get_num_threads() if b * g * d * d * k >= WORTH_THREADS else 1
    slices = threads // math.gcd(threads, g) if g < 4 * threads else 1
    total = columns.new_empty((g, d, d), dtype=torch.float64)
    given = Columns(columns.data_ptr(), TYPES[columns.dtype], columns.itemsize, b, g, d, k, *columns.stride())
    multiply = compiled.gram_double if dtype == torch.float64 else compiled.gram_float
    if multiply(ctypes.byref(given), ctypes.c_void_p(total.data_ptr()), threads, slices):
        raise MemoryError(f"no memory for sums of {g} x {d} x {d} products, {slices} of each")
    return total


@cache
def library() -> ctypes.CDLL | None:
    """The compiled sums; None where they cannot be had, or are wrong."""
    if os.environ.get("CONDZOO_NATIVE") == "0":
        return None
    with suppress(OSError, subprocess.SubprocessError):
        compiled = _loaded()
        return compiled if _is_right(compiled) else None
    return None


def _is_right(compiled: ctypes.CDLL) -> bool:
    """Whether it multiplies small integers without an error: a compiler or a processor may be broken."""
    columns = (torch.arange(3 * 7 * 300, device="cpu") % 17 - 8).view(3, 1, 7, 300)
    exact = (columns[:, 0] @ columns[:, 0].mT).sum(0, keepdim=True).double()
    layouts = columns, columns.mT.contiguous().mT  # by coordinates and by rows
    return all(
        torch.equal(_gram(compiled, x.to(dtype), by), exact)
        for x in layouts
        for dtype in TYPES
        for by in (torch.float64, torch.float32)
    )


def _loaded() -> ctypes.CDLL:
    compiler = _compiler()
    parts = [*(source.read_bytes() for source in SOURCES), " ".join([*compiler, *OPTIONS, _processor()]).encode()]
    folder, name = _cache_folder(), f"gram-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(prefix="condzoo-") as made:
        file = Path(made) / name
        command = [*compiler, *OPTIONS, str(SOURCES[0]), "-o", str(file)]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        found = ctypes.CDLL(str(file))
        with suppress(OSError):  # it is made again next time
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / f"{name}.{os.getpid()}"
            try:
                shutil.copy(file, kept)
                kept.replace(folder / name)  # whole or not at all: several processes may do so at once
            finally:
                kept.unlink(missing_ok=True)
    return found


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError("no C compiler")


def _processor() -> str:
    """What decides what `-march=native` compiles for."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "|".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path:
    """CONDZOO_CACHE/native, else condzoo/native in the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    if os.environ.get("CONDZOO_CACHE"):
        return Path(os.path.expanduser(os.environ["CONDZOO_CACHE"])) / "native"
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "condzoo" / "native"
