"""The files of a run: who may write to the folder, what goes into it, and how it gets there safely."""

import contextlib
import errno
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from condzoo.training.recipe import dump_recipe, load_recipe
from condzoo.training.schema import Recipe

RECIPE, METRICS, SUMMARY = "recipe.toml", "metrics.jsonl", "summary.json"
ENVIRONMENT, MODEL, CHECKPOINTS = "environment.json", "model.safetensors", "checkpoints"
CONDITIONING, PICTURE = "conditioning.jsonl", "conditioning.png"
TEMPORARY = ".tmp"  # at the end of the name of a file that is being written
UNSYNCED = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # of a file system that syncs no folders: AFS, 9p, vboxsf


class RunDirectoryError(ValueError):
    """A run directory that this run must not write to."""


@contextlib.contextmanager
def claimed(path: Path, recipe: Recipe) -> Iterator[None]:
    """Hold the run directory for this process alone, for this recipe alone.

    A new directory gets the recipe as resolved; an old one must hold an equal one. Where nothing comes of a new one,
    since its data is missing or its first step needs too much memory, the recipe goes again: it may be another one that
    mends it.

    Raises:
        RunDirectoryError: it belongs to another recipe, or another process writes to it.
        OSError: it cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a run directory; use another --out")
    lock = FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunDirectoryError(
            f"{path} is in use by another run; wait for it, or use another --out; if none runs there any more (it was "
            f"killed on another machine), delete {path / '.lock'}"
        ) from error
    except OSError as error:
        reason = f"{error.strerror}: no run can be written here; use another --out"
        raise OSError(error.errno, reason, str(path)) from error
    new = False
    try:
        new = not begun(path, recipe)
        if new:
            write_atomically(path / RECIPE, dump_recipe(recipe).encode())
        yield
    except BaseException:
        if new and not any(p.name not in (".lock", RECIPE, ENVIRONMENT) for p in path.iterdir()):
            for name in (ENVIRONMENT, RECIPE):
                (path / name).unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def begun(path: Path, recipe: Recipe) -> bool:
    """Whether a run of the recipe began in a folder; False where none did yet.

    Raises:
        RunDirectoryError: the folder is another recipe's, or no run directory.
    """
    if not path.exists():
        return False
    stored = path / RECIPE
    if not stored.exists():
        ours = (".lock", RECIPE + TEMPORARY)  # of a run that was killed as it began
        strangers = sorted(p.name for p in path.iterdir() if p.name not in ours)
        if strangers:
            raise RunDirectoryError(
                f"{path} holds {strangers[0]!r} but no {RECIPE}: it is not a run directory; use another --out"
            )
        return False
    other = load_recipe(stored)
    if other != recipe:
        raise RunDirectoryError(
            f"{path} belongs to another recipe: {_first_difference(other, recipe)}; use another --out"
        )
    return True


def _first_difference(there: Recipe, here: Recipe) -> str:
    theirs, ours = _flat(there.model_dump()), _flat(here.model_dump())
    field = next(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
    return f"{field} is {theirs.get(field)!r} there and {ours.get(field)!r} here"


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file a failed write was for: the system's own error often does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was saved before stands", str(path)) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, on the disk for certain, then rename: readers see the old or the new."""
    temporary = path.with_name(path.name + TEMPORARY)
    with _naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system and the file system can (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in UNSYNCED:
                raise
        finally:
            os.close(handle)


def to_json(record: Any, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def write_json(path: Path, record: Any) -> None:
    """Write one JSON file atomically."""
    write_atomically(path, (to_json(record, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        RunDirectoryError: it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{path} is damaged: {error}; delete it") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a run.

    Raises:
        RunDirectoryError: it is damaged, or no run's.
    """
    summary = read_json(folder / SUMMARY)
    if not isinstance(summary, dict) or not {"status", "steps", "epochs"} <= summary.keys():
        raise _damaged(f"{folder / SUMMARY} is not the summary of a run; delete it")
    return summary


def _damaged(what: str) -> RunDirectoryError:
    return RunDirectoryError(f"{what}, and give the `condzoo train` command of the run again")


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a .jsonl file."""
    with _naming(path), path.open("a", encoding="utf-8") as file:
        file.write(to_json(record) + "\n")


def durable_size(path: Path) -> int:
    """Bytes of a file, on the disk for certain; 0 where there is none."""
    if not path.exists():
        return 0
    with _naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def checksum(path: Path, size: int) -> int:
    """CRC-32 of the first bytes of a file; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return zlib.crc32(file.read(size))


def truncate(path: Path, size: int) -> bool:
    """Cut a file of lines back to what it held at a checkpoint; False where that is no longer there.

    It then ends with the last whole line of what is: the next one must not begin within a line.
    """
    if not path.exists():
        return size == 0
    with path.open("r+b") as file:
        file.seek(max(0, size - 1))
        if file.read(1) == b"\n":
            file.truncate(size)
            return True
        file.seek(0)
        file.truncate(file.read(size).rfind(b"\n") + 1)
    return size == 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a metrics.jsonl; none where there is no file.

    Raises:
        RunDirectoryError: a line is damaged, or no record of a run.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
                raise ValueError("it is no record of a step or an epoch")
        except (ValueError, RecursionError) as error:
            raise _damaged(f"line {number} of {path} is damaged: {error}; delete that line") from error
        records.append(record)
    return records
