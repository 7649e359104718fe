"""Paths as users write them."""

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ~ as the home; that of a user without a home stays."""
    return Path(os.path.expanduser(path))  # os.path's: Path's raises where there is no home
