"""Random numbers that are a function of a counter: no stream, no state, the same on every device.

A draw made from (seed, epoch, index) does not depend on the batch it falls into, on workers or on
ranks, and a resumed run needs no generator state to go on.
"""

import torch
from jaxtyping import Int64
from torch import Tensor

# SplitMix64's constants as signed 64-bit integers; int64 products wrap around, as the hash needs.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_FIELD_BITS = 20


def _shift_right(x: Int64[Tensor, "n"], bits: int) -> Int64[Tensor, "n"]:
    """Logical shift; torch's own is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """SplitMix64's output function: 64 well-mixed bits for each input.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def random_words(seed: int, epoch: int, index: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """64 random bits for each index, a function of (seed, epoch, index) alone."""
    words = _mix(torch.full_like(index, seed))
    words = _mix(words + epoch)
    return _mix(words + index)


def random_below(words: Int64[Tensor, "n"], limit: int, field: int) -> Int64[Tensor, "n"]:
    """Integers in [0, limit) from one of the three 20-bit fields of each word; relative bias under limit/2^20."""
    if field not in (0, 1, 2):
        raise ValueError(f"a word has the fields 0, 1 and 2, got {field}")
    bits = _shift_right(words, 4 + field * _FIELD_BITS) & ((1 << _FIELD_BITS) - 1)
    return (bits * limit) >> _FIELD_BITS


def derived_seed(seed: int, *counters: int) -> int:
    """A seed for a torch.Generator, a function of (seed, counters): non-negative, under 2^63."""
    word = _mix(torch.tensor([seed], device="cpu"))
    for counter in counters:
        word = _mix(word + counter)
    return int(_shift_right(word, 1))
