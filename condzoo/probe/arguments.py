"""Arguments that a caller gives: the value, or one clear error with its name."""

import math
import operator
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, SupportsIndex

from condzoo.probe.files import expanded


def whole_number(name: str, value: int) -> int:
    """The value if it is a whole number, 0 or more.

    Raises:
        TypeError: it is no whole number; ValueError: it is negative.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number of steps, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
    return operator.index(value)


def whole_seed(seed: SupportsIndex) -> int:
    """The seed as an int: numpy's whole numbers are seeds, too, and torch's generators refuse them.

    Raises:
        TypeError: it is no whole number; ValueError: torch's generators take none of its size.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be a whole number, got {seed!r}") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be from -2**63 to 2**64 - 1, got a number of {number.bit_length()} bits")
    return number


def folder(name: str, value: Any) -> Path | None:
    """The folder, wherever a loop moves to from here, or None; else a TypeError."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a folder (a str or Path) or None, got {value!r:.60}")
    return None if value is None else expanded(value).absolute()


def grad_scaler(value: Any) -> Any:
    """The GradScaler, or None; of a wrapper around one, as timm's NativeScaler, what is inside.

    Raises:
        TypeError: it has no scale to ask for.
    """
    found = getattr(value, "_scaler", value)
    if found is not None and not hasattr(found, "get_scale"):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(value).__name__}; a factor that is known "
            "otherwise goes to loss_scale"
        )
    return found


def positive(name: str, value: Any) -> float:
    """The value if it is a finite number above 0, else a ValueError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return number


def checked(name: str, value: str, allowed: Sequence[str]) -> Any:
    """The value if it is allowed, else a ValueError that names the closest."""
    if value not in allowed:
        close = get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
    return value
