"""The command line in a process forked from the tests' own: a signal can be sent to it, and it imports nothing."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from condzoo.cli import main
from tests.forked import LIMIT, forked, wait_until


@dataclass(frozen=True)
class Ended:
    """How a command ended (None: it had to be killed), and what it printed."""

    code: int | None
    out: str
    err: str


def interrupted(args: list[str], when: str, folder: Path) -> Ended:
    """`condzoo ARGS`, sent a SIGINT once it prints a line that begins with `when`; its output goes to the folder."""
    out, err = folder / "stdout.txt", folder / "stderr.txt"

    def command() -> None:
        sys.stdout, sys.stderr = out.open("w", buffering=1), err.open("w", buffering=1)
        main(args)

    def begun() -> bool:
        return not process.is_alive() or any(line.startswith(when) for line in printed(out).splitlines())

    with forked(command) as process:
        wait_until(begun, process)
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
        process.join(LIMIT)
        code = process.exitcode
    return Ended(code, printed(out), printed(err))


def printed(path: Path) -> str:
    """What is in a file by now."""
    return path.read_text() if path.exists() else ""
