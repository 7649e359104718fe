"""Products of data columns with themselves, and how much noise their arithmetic leaves.

`fast` multiplies in float32 piece by piece and adds the pieces in float64; `float64` multiplies in
float64. The constants are calibrated so that an eigenvalue above the floor is right to 5 %
(tests/probe/test_known_kappa.py holds them to it).
Shapes: b pieces, g groups, d coordinates, k rows a piece.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from condzoo.probe import native
from condzoo.probe.rounding import GPU_SLICE, SLICE

Precision = Literal["auto", "float64", "fast"]
PRECISIONS = ("auto", "float64", "fast")
PLAIN = ("none", "ieee")  # settings with which torch multiplies float32 in float32

SAFETY = 20  # an eigenvalue this many times its noise is right to 5 %
FLOAT32_PRODUCT = 100 * 2.0**-24  # SAFETY * the 5 u ||M|| / sqrt(b) seen at most over shapes 16..1024
FLOAT64_PRODUCT = 100 * 2.0**-53  # times sqrt(d) * lambda_max: the product and eigvalsh together
DATA_ROUNDINGS = 2.0  # roundings that a value of the data has behind it, at least
# Rows that are added in one chain, as BLAS does in small products, of 2 to 16 coordinates; of more, as many more rows.
# Where they are alike (maps that are constant but for a few pixels), all roundings are in one direction, and the noise
# grows with the chain and not with its root; in the direction of a small eigenvalue less so, the more coordinates. Of
# one coordinate (depthwise convolutions) it is no more than 2**-12 of the sum in the longest.
CHAIN_FLOAT32, CHAIN_FLOAT64, LONGEST_CHAIN = 1 << 8, 1 << 10, 1 << 13
CHAINS = 4  # of a piece, whose products are added in float32
WIDE, WIDE_CHAIN = 16, CHAINS * CHAIN_FLOAT32  # from so many coordinates on the chain may be as long: it is quicker
FOLD = 8  # products of pieces added in float32: the noise stays as calibrated, and the conversion to float64 is short
PRODUCTS = 1 << 21  # numbers in products at a time: 8 MB stay in a cache, and are no new memory each time
PAIR = 1 << 23  # numbers in two products, up to which two are added in float32 before float64 takes over


def _precision_before(backend: str, op: str) -> str:
    """What `_precision` says, for torch before 2.9: matrix products have one setting, cuDNN's convolutions another."""
    if op == "matmul":
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if backend == "cuda" and torch.backends.cudnn.allow_tf32 else "ieee"


# How float32 is multiplied, by backend and op. Not by way of torch.backends, whose attributes take ten times as long.
_precision: Callable[[str, str], str] = getattr(torch._C, "_get_fp32_precision_getter", _precision_before)
_set_precision: Callable[[str, str, str], None] | None = getattr(torch._C, "_set_fp32_precision_setter", None)


def plain_products(device_type: str) -> AbstractContextManager[None]:
    """Matrix products in the dtype of their operands: no autocast, no TF32 or bf16 inside float32.

    Nor do torch-function modes see them: one, as `function_calls` has, costs more than a small product.
    The operands are detached.
    """
    plain = _precision("cuda" if device_type == "cuda" else "mkldnn", "matmul") in PLAIN
    if plain and not torch.is_autocast_enabled(device_type):
        return torch._C.DisableTorchFunction()  # this is entered twice a layer, and asking is quicker than setting
    return _in_full_precision(device_type)


@contextmanager
def _in_full_precision(device_type: str) -> Iterator[None]:
    with (
        _plain("matmul", device_type),
        torch.autocast(device_type, enabled=False),
        torch._C.DisableTorchFunction(),
    ):
        yield


def plain_convolutions(device_type: str) -> AbstractContextManager[None]:
    """Convolutions of float32 in float32: cuDNN takes TF32 unless told otherwise."""
    return _plain("conv", device_type)


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Passes through a network with float32 in float32: no TF32, which cuDNN takes unless told otherwise, and no bf16.

    Unlike in `plain_products`, autocast and torch-function modes stay.
    """
    with ExitStack() as held:
        for op in ("matmul", "conv", "rnn"):
            held.enter_context(_plain(op, device_type))
        yield


def in_tf32(device: torch.device, *, convolution: bool) -> bool:
    """Whether torch multiplies float32 there in TF32, as cuDNN's convolutions do unless told otherwise."""
    return device.type == "cuda" and _precision("cuda", "conv" if convolution else "matmul") not in PLAIN


def _plain(op: str, device_type: str) -> AbstractContextManager[None]:
    backend = "cuda" if device_type == "cuda" else "mkldnn"
    if _precision(backend, op) in PLAIN:
        return nullcontext()
    return _set_plain_before(op) if _set_precision is None else _set_plain(backend, op, _set_precision)


@dataclass(frozen=True)
class _OldSetting:
    """A setting from before torch 2.9, which torch still has: it moves newer ones, and cannot be read beside others."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    plain: Any
    moves: tuple[tuple[str, str], ...]

    def value(self) -> Any:
        """What it says; None where the newer ones say something else, which is an error of torch."""
        with warnings.catch_warnings(), suppress(RuntimeError):
            warnings.simplefilter("ignore")  # torch 2.9 says once that it is old
            return self.read()
        return None


def _old_products() -> str:
    torch._C._get_cublas_allow_tf32()  # looks at CUDA's newer setting, the other one at those of CPUs
    return torch.get_float32_matmul_precision()


OLD_PRODUCTS = _OldSetting(
    _old_products, torch.set_float32_matmul_precision, "highest", (("cuda", "matmul"), ("mkldnn", "matmul"))
)
OLD_CUDNN = _OldSetting(
    torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, False, (("cuda", "conv"), ("cuda", "rnn"))
)


@contextmanager
def _set_plain(backend: str, op: str, set_precision: Callable[[str, str, str], None]) -> Iterator[None]:
    """Sets what decides, and with it the old setting where that agrees with the newer ones: it can be read inside, too.

    `torch.compile` does so. Afterwards each op follows what it followed before; cuDNN's, which are in TF32 as long as
    nobody sets them, are then set to it, since no setting gives that default back.
    """
    old = OLD_PRODUCTS if op == "matmul" else OLD_CUDNN if backend == "cuda" else None
    before = None if old is None else old.value()
    with ExitStack() as held:
        moved = [(backend, op)] if old is None or before is None else old.moves
        for key in moved:
            held.callback(set_precision, *key, _own_precision(*key, set_precision))
        if old is not None and before is not None:
            held.callback(old.write, before)
            old.write(old.plain)
        for key in moved:
            set_precision(*key, "ieee")
        yield


def _own_precision(backend: str, op: str, set_precision: Callable[[str, str, str], None]) -> str:
    """What an op is set to itself; what has no setting of its own reads as the more general one."""
    with ExitStack() as held:
        for level in (("generic", "all"), (backend, "all")):
            held.callback(set_precision, *level, _precision(*level))
            set_precision(*level, "none")
        return _precision(backend, op)


@contextmanager
def _set_plain_before(op: str) -> Iterator[None]:
    """For torch before 2.9."""
    if op == "matmul":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        own = {key: getattr(torch.backends.cudnn, key) for key in ("enabled", "benchmark", "deterministic")}
        with torch.backends.cudnn.flags(**own, allow_tf32=False):
            yield


def gram_float32(columns: Float[Tensor, "b g d k"]) -> Float[Tensor, "g d d"]:
    """sum over pieces and rows of x x^T: float32 over chains of rows and up to 8 of them, float64 over all."""
    if native.takes(columns):
        return native.gram(columns, torch.float32)
    _, g, d, _ = columns.shape
    size = g * d * d
    step = max(1, PRODUCTS // size, min(2, PAIR // size))
    total: Tensor | None = None
    for rows in chains(columns, CHAIN_FLOAT32 * CHAINS):
        for part in [rows] if len(rows) <= step else rows.split(step):
            product = _piece_sum(part.reshape(-1, d, part.shape[3]).float(), g)
            total = product if total is None else total.add_(product)  # none waits: a large one is gigabytes
    return columns.new_zeros((g, d, d), dtype=torch.float64) if total is None else total


def chains(columns: Float[Tensor, "b g d k"], longest: int) -> Iterator[Float[Tensor, "_ g d _"]]:
    """The same rows in pieces, as few tensors of them as there can be without a copy.

    longest: rows a piece, at most, of 2 to 16 coordinates.
    """
    dim, rows = columns.shape[2:]
    longest = _chain(dim, longest)
    if rows <= longest:
        yield columns
        return
    count = rows // longest
    whole = columns[..., : count * longest]
    if len(columns) < count:  # few maps of many positions
        yield from (piece.unflatten(2, (count, longest)).permute(2, 0, 1, 3) for piece in whole)
    else:
        yield from whole.split(longest, dim=3)
    if count * longest < rows:
        yield columns[..., count * longest :]


def _chain(dim: int, longest: int) -> int:
    return LONGEST_CHAIN if dim == 1 else min(LONGEST_CHAIN, longest * max(1, dim // 16))


def _piece_sum(pieces: Float[Tensor, "bg d k"], groups: int) -> Float[Tensor, "g d d"]:
    dim, width = pieces.shape[1:]
    chain = _chain(dim, CHAIN_FLOAT32)
    first, *more = pieces.split(chain if dim < WIDE else max(chain, WIDE_CHAIN), dim=2)
    products = torch.bmm(first, first.mT)
    for rows in more:
        products.baddbmm_(rows, rows.mT)
    count = products.shape[0] // groups
    together = math.gcd(count, max(1, FOLD // math.ceil(width / chain)))
    few = products.view(count // together, together, groups, *products.shape[1:]).sum(1)
    return few.sum(0, dtype=torch.float64)


def gram_float64(columns: Float[Tensor, "b g d k"]) -> Float[Tensor, "g d d"]:
    """sum over pieces and rows of x x^T, all in float64, a slice at a time."""
    if native.takes(columns):
        return native.gram(columns)
    b, g, d, k = columns.shape
    step = max(1, SLICE // (g * d * k) if columns.device.type == "cpu" else GPU_SLICE // (g * d * max(d, k)))
    total = columns.new_zeros((g, d, d), dtype=torch.float64)
    for start in range(0, b, step):
        for rows in chains(columns[start : start + step].double(), CHAIN_FLOAT64):
            piece = rows.reshape(-1, d, rows.shape[3])
            total += torch.bmm(piece, piece.mT).reshape(-1, g, d, d).sum(0)
    return total


def float32_noise(total: Float[Tensor, "g d d"], pieces: int | float) -> float:
    """Floor that float32 products leave in a sum of `pieces` of them, in the sum's units; inf or NaN if it is.

    The noise of no more pieces than there are coordinates is taken to average out; where rows repeat, all pieces have
    the same. In the direction of a small eigenvalue it is then up to 3.2 u ||M|| of 2 coordinates, 0.7 u of 16 and
    0.1 u of 64, which is under 5 % of the floor. Where it is more, `rounding.holds` says so.
    """
    flat = total.flatten()  # numbers of float32's range, whose squares are in float64's
    norm = math.sqrt(float(flat @ flat)) if total.shape[0] == 1 else float(torch.linalg.matrix_norm(total).max())
    return FLOAT32_PRODUCT * norm / math.sqrt(min(pieces, total.shape[-1]))


def data_noise(dtype: torch.dtype, largest_diagonal: float, grain: float = 0.0) -> float:
    """Floor that the rounding of the data itself leaves: 20 * (2 u)^2 / 3 * max_i E[x_i^2] + 20 * grain^2 / 3."""
    roundoff = DATA_ROUNDINGS * torch.finfo(dtype).eps / 2
    return SAFETY * roundoff**2 / 3 * largest_diagonal + SAFETY * grain**2 / 3


@cache
def grain_of(dtype: torch.dtype) -> float:
    """Distance between the smallest numbers of a dtype, which have fewer digits than its others: 6e-8 for float16."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def float64_noise(dim: int, lambda_max: float) -> float:
    """Floor that float64 products and the eigenvalue solver leave."""
    return FLOAT64_PRODUCT * math.sqrt(dim) * lambda_max
