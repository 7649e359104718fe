"""Processes forked from the tests' own: they import nothing, and none outlives the test that failed or hung."""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

LIMIT = 300.0  # seconds that a test waits for one, however busy the machine is


def forks(test: Any) -> Any:
    """Of a test that forks a process: Windows cannot, and later versions of Python warn where there are threads."""
    can = pytest.mark.skipif(os.name == "nt", reason="forks")
    return can(pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")(test))


@contextmanager
def forked(action: Callable[[], object]) -> Iterator[BaseProcess]:
    """A process that does the action, killed as the block ends; its exit code: SystemExit's, else 0, 1 on an error."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run_anew(program: str, folder: Path, packages: Sequence[str] = ("condzoo",)) -> str:
    """What a program prints that imports these packages anew, as if none had been: of others it has those of the tests.

    An interpreter of its own would import torch first, which takes seconds.

    Raises:
        AssertionError: the program raised an error, which is in the text.
    """
    printed = folder / "printed.txt"

    def forget_and_run() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
        # which checks shapes, and would compile each module again
        sys.meta_path[:] = [finder for finder in sys.meta_path if "jaxtyping" not in type(finder).__module__]
        with printed.open("w") as sys.stdout, contextlib.redirect_stderr(sys.stdout):
            try:
                exec(program, {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
                raise

    with forked(forget_and_run) as process:
        process.join(LIMIT)
    text = printed.read_text()
    assert process.exitcode == 0, text
    return text


def wait_until(condition: Callable[[], object], process: BaseProcess) -> None:
    """Wait for what a process brings about while it runs.

    Raises:
        AssertionError: it ended first, or the limit came.
    """
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.is_alive(), f"the process ended first, with exit code {process.exitcode}"
        assert time.monotonic() < deadline, f"not after {LIMIT:.0f} seconds"
        time.sleep(0.01)
