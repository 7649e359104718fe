"""Weights in files. Those that are read may be damaged or hostile: nothing is executed, nothing else is opened.

A file is read once, as bytes; what is hashed, parsed and loaded are the same bytes.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's zip, and its older plain pickle


def read_plain_file(path: Path) -> bytes:
    """The content of a regular file; a link, a folder or a device is not followed or waited for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file, or larger than memory.
    """
    if path.is_symlink():
        raise ValueError(
            f"{path} is a symbolic link; a checkpoint's files must be plain files "
            "(of the Hub's: huggingface_hub.snapshot_download(..., local_dir=FOLDER))"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    # the flags cover a link or a pipe that was put there since, and Windows' reading as text
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    handle = os.open(path, sum(flags, os.O_RDONLY))
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):  # before fdopen, which has an error of its own for a folder
        os.close(handle)
        raise ValueError(f"{path} is not a plain file")
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read()
        except MemoryError as error:
            raise ValueError(
                f"{path} has {status.st_size:,} bytes, more than there is memory for; free some, or get the file again"
            ) from error


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as a safetensors file, which timm reads too; of several in one memory each is written whole.

    safetensors refuses those, and a network has them where a module or a weight has two names.
    """
    written: dict[str, Tensor] = {}
    memories = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()  # which copies nothing of what is so already
        memory = own.untyped_storage().data_ptr()
        written[name] = own.clone() if memory in memories else own
        memories.add(memory)
    return save(written, metadata={"format": "pt"})


def parse_weights(content: bytes, source: str, *, finite: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        content: the whole file.
        source: what errors call it.
        finite: all values must be.

    Raises:
        ValueError: not a safetensors file (a pickle, truncated, an impossible header, overlapping or missing
            bytes), or a value that is NaN or infinite.
    """
    try:
        state = load(content)
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=named_once)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # only now: the length of a header, which a safetensors file begins with, may have a pickle's first bytes
        if content.startswith(PICKLE_STARTS):
            raise ValueError(
                f"{source} is a pickle, not safetensors; `condzoo convert` reads those without running them"
            ) from error
        raise ValueError(f"{source} is not a readable safetensors file: {error}; get it again") from error
    for key, value in state.items():
        if finite and value.is_floating_point() and not torch.isfinite(value.double()).all():
            raise ValueError(f"{source}: {key!r} has values that are not finite; these weights cannot be used")
    return state


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header; ValueError for a name that is there twice, of which readers take one or the other."""
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"its header has {name!r} {times} times")
    return dict(pairs)


@contextmanager
def as_saved() -> Iterator[None]:
    """Networks built inside are as files have them, and hold no values."""
    with in_float32(), torch.device("meta"):
        yield


@contextmanager
def in_float32() -> Iterator[None]:
    """What is built, and calculated on the CPU, inside is so in float32, whatever the default dtype and autocast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Check keys, shapes and dtypes against a network's own state dict (which may be on the meta device).

    Raises:
        ValueError: names the first key, in the network's order, that differs, and both shapes.
    """
    for key, wanted in expected.items():
        if key not in state:
            raise ValueError(f"{source}: {key!r} is missing; the network has it as {describe(wanted)}")
        if state[key].shape != wanted.shape or state[key].dtype != wanted.dtype:
            raise ValueError(f"{source}: {key!r} is {describe(state[key])}, the network's is {describe(wanted)}")
    for key in state:
        if key not in expected:
            raise ValueError(f"{source}: {key!r} is {describe(state[key])}, and the network has no such key")


def describe(value: Tensor) -> str:
    """Shape and dtype for people: `[64, 10] float32`."""
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
