"""The folder of a checkpoint, `arch.tag/`: which files, how they are summed, and reading them safely.

Every file is read once, checked against SHA256SUMS, and used from memory. Nothing outside the folder is read.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from condzoo.models.weight_files import parse_weights, read_plain_file, sha256
from condzoo.probe.files import expanded

WEIGHTS, CONFIG, EXPECTED, SUMS, CARD = "model.safetensors", "config.json", "expected.json", "SHA256SUMS", "README.md"
RECIPE, METRICS, CONDITIONING, PICTURE = "recipe.toml", "metrics.json", "conditioning.json", "conditioning.png"
CONVERSION = "conversion.json"
RUN_SUMMARY = "summary.json"  # what a run directory has and no checkpoint does

ALWAYS = (WEIGHTS, CONFIG, EXPECTED, CARD)
TRAINED = (RECIPE, METRICS, CONDITIONING, PICTURE)  # what a training leaves, in place of conversion.json
SUM_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint's files in memory, as they were when their sums were checked."""

    path: Path
    files: dict[str, bytes]

    @property
    def trained(self) -> bool:
        """Whether it comes from a run (with recipe and metrics), not from a conversion."""
        return METRICS in self.files

    def source(self, name: str) -> str:
        """What errors call one of the files."""
        return str(self.path / name)

    def text(self, name: str) -> str:
        """A text file.

        Raises:
            ValueError: not there, or not UTF-8.
        """
        if name not in self.files:
            raise ValueError(f"{self.path} lacks {name}; a checkpoint has {', '.join((*ALWAYS, SUMS))}")
        try:
            return self.files[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.source(name)} is not UTF-8 text: {error}") from error

    def weights(self) -> dict[str, Tensor]:
        """The tensors; ValueError where the file is damaged or holds values that are not finite."""
        return parse_weights(self.files[WEIGHTS], self.source(WEIGHTS))


def folder_at(path: Path) -> Path:
    """The folder that a path to a checkpoint, or to its model.safetensors, names.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file and no folder.
    """
    path = expanded(path)
    folder = path.parent if path.name == WEIGHTS else path
    if folder.is_file():
        if (folder.parent.parent / RECIPE).is_file():
            run = folder.parent.parent
            raise ValueError(f"{path} is a state that the run {run} goes on from, no checkpoint; give the run")
        raise ValueError(
            f"{path} is a file; `condzoo convert {path} --model NAME` makes a checkpoint of weights in one"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: it must be a folder with {', '.join(ALWAYS)} and {SUMS}")
    return folder


def read_folder(path: Path, linked: bool = False) -> CheckpointFolder:
    """Read a checkpoint's folder, or the one that a path to its model.safetensors lies in.

    Args:
        path: the folder.
        linked: its files may be symbolic links: for the package's own, which some installers make so.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file and no folder; files that are missing, not listed in SHA256SUMS, changed, or not plain files.
    """
    folder = folder_at(path)
    if not (folder / SUMS).exists() and (folder / RUN_SUMMARY).exists():
        raise ValueError(f"{folder} is a run directory; `condzoo release {folder} --tag TAG` makes a checkpoint of it")
    sums = read_sums(folder, linked)
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}  # hidden: never read
    for name in sorted(present - sums.keys() - {SUMS}):
        raise ValueError(f"{folder / name} is not listed in {SUMS}; a checkpoint holds nothing else")
    files = {}
    for name, wanted in sums.items():
        files[name] = read_plain_file(target_of(folder / name, linked))
        if sha256(files[name]) != wanted:
            raise ValueError(f"{folder / name} is not as it was summed: SHA-256 differs from {SUMS}; get it again")
    return check_complete(CheckpointFolder(folder, files))


def check_complete(folder: CheckpointFolder) -> CheckpointFolder:
    """ValueError for a folder that lacks a file that a checkpoint of its kind must have, or is of both kinds."""
    if CONVERSION in folder.files and METRICS in folder.files:
        raise ValueError(f"{folder.path} has both {METRICS} and {CONVERSION}: it was either trained here or converted")
    wanted = (*ALWAYS, CONVERSION) if CONVERSION in folder.files else (*ALWAYS, *TRAINED)
    for name in wanted:
        folder.text(name) if name not in (WEIGHTS, PICTURE) else require(folder, name)
    return folder


def require(folder: CheckpointFolder, name: str) -> bytes:
    """The content of a file that must be there; ValueError where it is not."""
    if name not in folder.files:
        raise ValueError(f"{folder.path} lacks {name}; it is no complete checkpoint")
    return folder.files[name]


def target_of(path: Path, linked: bool) -> Path:
    """The path, or with `linked` what it is a link to."""
    return Path(os.path.realpath(path)) if linked else path


def read_sums(folder: Path, linked: bool = False) -> dict[str, str]:
    """The sums by file name, as `sha256sum` writes them; `linked` as for `read_folder`.

    Raises:
        ValueError: no such file, or a line that is not a sum and a plain name (no `/`, no `..`).
    """
    if not (folder / SUMS).exists():
        within = ", ".join(sorted(each.parent.name for each in folder.glob(f"*/{SUMS}")))
        if not within and not (folder / RECIPE).exists():
            raise ValueError(f"{folder} is neither a checkpoint (no {SUMS}) nor a run (no {RECIPE})")
        raise ValueError(f"{folder} has no {SUMS}; it is no checkpoint{within and ', but holds '}{within}")
    try:
        # not splitlines: to it a vertical tab, one bit from a newline, ends a line, too
        lines = read_plain_file(target_of(folder / SUMS, linked)).decode("ascii").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / SUMS} is not plain text: {error}") from error
    sums: dict[str, str] = {}
    for line in lines:
        match = SUM_LINE.fullmatch(line)
        if match is None or match[2] in sums or match[2] == SUMS:
            raise ValueError(f"{folder / SUMS} has a line that is not one sum and one plain file name: {line[:80]!r}")
        sums[match[2]] = match[1]
    return sums


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every other file of the folder."""
    names = sorted(p.name for p in folder.iterdir() if p.name != SUMS and not p.name.startswith("."))
    lines = [f"{sha256(read_plain_file(folder / name))}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="ascii")


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, two spaces an indent, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
