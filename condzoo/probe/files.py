"""Paths as users write them, and files that are written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ~ as the home; that of a user without a home stays."""
    return Path(os.path.expanduser(path))  # os.path's: Path's raises where there is no home


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file a failed write was for: of a full disk the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library's own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, its folder made if need be; where that fails, what was there before stays.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with naming(path):
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe: what it leads to may have no path of its own
            path.write_bytes(content)
            return
        real = Path(os.path.realpath(path))
        temporary = real.with_name(f".{real.name}.{os.getpid()}.tmp")  # shards of a sweep may draw one picture
        real.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            if real.exists():
                with contextlib.suppress(OSError):  # some file systems have no permissions
                    shutil.copymode(real, temporary)
            temporary.replace(real)
        finally:
            temporary.unlink(missing_ok=True)
