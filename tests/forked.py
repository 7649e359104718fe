"""Processes forked from the tests' own: they import nothing, and none outlives the test that failed or hung."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

LIMIT = 300.0  # seconds that a test waits for one, however busy the machine is


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
