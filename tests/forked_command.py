"""The command line in a process forked from the tests' own: a signal can be sent to it, and it imports nothing."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from condzoo.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def interrupted(args: list[str], when: str, folder: Path) -> Ended:
    """`condzoo ARGS`, sent a SIGINT once it prints a line that begins with `when`; its output goes to the folder."""
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.stdout, sys.stderr = out.open("w", buffering=1), err.open("w", buffering=1)
            main(args)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    while not any(line.startswith(when) for line in printed(out).splitlines()):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return Ended(os.waitstatus_to_exitcode(status), printed(out), printed(err))
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), printed(out), printed(err))


def printed(path: Path) -> str:
    """What is in a file by now."""
    return path.read_text() if path.exists() else ""
