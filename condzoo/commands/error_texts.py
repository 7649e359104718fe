"""What the command line says of an error, in one line."""

import re
from typing import Any

from condzoo import exit_codes

SMALLER_BATCHES = "; use a smaller data.batch_size, or a larger accumulate"
LESS_MEMORY = {"train": SMALLER_BATCHES, "sweep": SMALLER_BATCHES, "probe": "; use a smaller --batch-size"}


def one_line(error: Any, code: int, command: str) -> str:
    """What is said of an error; of a wrong command line (typer's errors carry its context) also where help is."""
    if code == exit_codes.STOPPED:
        return str(error)
    if (context := getattr(error, "ctx", None)) is None:
        return f"error: {lack_of_memory(error, command) or not_compiled(error) or error}"
    message = " ".join(error.format_message().split()).rstrip(".") or "no command was given"
    if type(error.__cause__).__name__ == "ValidationError":  # newer typers say what pydantic says: not what came
        message = message.replace("Input should be", f"got {error.__cause__.errors()[0]['input']!r}, must be", 1)
    return f"error: {message}; see `{context.command_path} --help`"


def lack_of_memory(error: BaseException, command: str = "") -> str | None:
    """What is said of too little memory, for which torch has RuntimeErrors of many lines; None of other errors."""
    less = LESS_MEMORY.get(command, "")
    said = re.match(r"\S.*?(?=\.(\s|$)|$)(\. Tried to allocate [\d.]+ \w+)?", str(error))
    if said is not None and type(error).__name__ == "OutOfMemoryError":  # by its name: torch may not be imported
        return f"{said[0]}{less}"
    if isinstance(error, MemoryError):
        return f"{str(error) or 'too little memory'}{less}"
    if not isinstance(error, RuntimeError):
        return None
    if on_cpu := re.search(r"DefaultCPUAllocator: [^.]*", str(error)):
        return f"{on_cpu[0]}{less}"
    if said is not None and said[0].startswith("DataLoader worker (pid"):
        return f"{said[0]}; use fewer data.workers, or give them more memory (/dev/shm, in a container --shm-size)"
    return None


def not_compiled(error: BaseException) -> str | None:
    """What is said where torch.compile fails, most often for want of a C++ compiler; None of other errors."""
    if "TorchDynamoException" not in (kind.__name__ for kind in type(error).__mro__):  # as above
        return None
    lines = [line for line in str(error).splitlines() if not line.endswith(" raised:")]  # "backend='inductor' raised:"
    said = (lines or [type(error).__name__])[0]
    return f"compile: {said}; {'install one, or ' if 'CxxCompiler' in said else ''}set compile = false"
