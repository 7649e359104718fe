"""Checkpoints of a run that can be killed at any moment, and the way back to the newest whole one.

A checkpoint is two files: `step_0000000390.safetensors` with every tensor, then
`step_0000000390.json` with every number and the SHA-256 of both. The second one makes it valid: it is
written after the first is on the disk. The one before is kept.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from condzoo.models.weight_files import as_safetensors
from condzoo.training.run_directory import SUMMARY, TEMPORARY, write_atomically

KEPT = 2
DAMAGED = ".damaged"


class CheckpointError(ValueError):
    """A checkpoint that is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run before step `numbers["step"]`."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def checkpoint_files(folder: Path, end: str = ".json") -> list[Path]:
    """The files of checkpoints that end so, the newest first; a user's own copies, called much alike, are none."""
    name = re.compile(rf"step_\d{{10,}}{re.escape(end)}")
    return sorted((path for path in folder.glob("step_*") if name.fullmatch(path.name)), reverse=True)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, read it back, and only then delete all but the newest two.

    Raises:
        OSError: the disk is full or the folder cannot be written to; the old checkpoints stand.
        CheckpointError: what was written does not read back.
    """
    folder.mkdir(exist_ok=True)
    stem = f"step_{checkpoint.numbers['step']:010d}"
    content = as_safetensors(checkpoint.tensors)
    write_atomically(folder / f"{stem}.safetensors", content)
    numbers = {"numbers": checkpoint.numbers, "tensors_sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / f"{stem}.json", json.dumps(numbers | {"sha256": _digest(numbers)}).encode())
    _read_valid(folder / f"{stem}.json")
    _delete_old(folder)


def newest_checkpoint(folder: Path, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where none was ever finished. Newer ones are put aside by name.

    Where none is damaged, what a kill left of those that were being deleted goes: a run that ends here saves no other.

    Args:
        folder: of the checkpoints.
        notify: told about each damaged one that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
        OSError: one cannot be read at the moment, which is no reason to go on from an older one.
    """
    damaged = []
    for path in checkpoint_files(folder):
        try:
            content, numbers = _read_valid(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for fault in damaged:
            notify(f"{fault}; going on from {path.name} instead")
        for other in checkpoint_files(folder):  # one that is damaged must not count as one that is kept
            if other.name > path.name:
                other.replace(other.with_name(other.name + DAMAGED))
        if not damaged:
            _delete_old(folder)
        return Checkpoint(load(content), numbers)
    if damaged:
        raise CheckpointError(
            f"{'; '.join(damaged)}; no checkpoint is left to go on from: delete {folder}, and a {SUMMARY} "
            "beside it, to start again"
        )
    return None


def _read_valid(path: Path) -> tuple[bytes, dict[str, Any]]:
    """(the tensors' bytes, the numbers) of a checkpoint whose checksums hold.

    Raises:
        CheckpointError: they do not, or a file is missing.
        OSError: a file is there and cannot be read: a network's file system, or rights to it, may come back.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        expected = stored.pop("sha256")
        tensors = path.with_suffix(".safetensors").read_bytes()
        whole = _digest(stored) == expected and hashlib.sha256(tensors).hexdigest() == stored["tensors_sha256"]
    except (FileNotFoundError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        fault = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"checkpoint {path} is damaged: {fault}") from error
    except OSError as error:
        reason = (
            f"{error.strerror}: the checkpoint cannot be read; try again, or delete it to go on from the one before"
        )
        raise OSError(error.errno, reason, str(path)) from error
    if not whole:
        raise CheckpointError(f"checkpoint {path} is damaged: a SHA-256 in it does not match")
    return tensors, stored["numbers"]


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _delete_old(folder: Path) -> None:
    """Delete all but the newest checkpoints, the part that makes one valid first."""
    for path in checkpoint_files(folder)[KEPT:]:
        path.unlink()
    valid = {path.stem for path in checkpoint_files(folder)}
    for path in checkpoint_files(folder, ".safetensors"):
        if path.stem not in valid:
            path.unlink()
    for end in (".safetensors", ".json"):
        for path in checkpoint_files(folder, end + TEMPORARY):  # of a run that was killed as it wrote
            path.unlink()
