"""What a step frees stays with the process: fewer page faults."""

import os
import resource
import subprocess
import sys

import pytest

from condzoo.training import host_memory

BLOCKS, STEPS, BYTES = 8, 4, 4_000_000

# A new interpreter, which has no freed memory that a request could be served from, and reads the one module.
PROGRAM = f"""
import resource, runpy
keep_freed_memory = runpy.run_path({host_memory.__file__!r})["keep_freed_memory"]
kept = KEPT and keep_freed_memory()
counts = []
for _ in range({STEPS} + 1):
    blocks = [b"x" * {BYTES} for _ in range({BLOCKS})]
    del blocks
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, counts[-1] - counts[0])
"""


def faults(kept: bool) -> tuple[str, int]:
    """Whether the setting was taken, and the page faults of some steps that each ask for the same blocks."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(host_memory.CHOSEN)}
    command = [sys.executable, "-c", PROGRAM.replace("KEPT", str(kept))]
    taken, count = subprocess.run(command, env=clean, check=True, capture_output=True, text=True).stdout.split()
    return taken, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    taken, count = faults(kept=True)
    if taken == "False":
        pytest.skip("another C library")
    pages = STEPS * BLOCKS * BYTES // resource.getpagesize()
    assert faults(kept=False)[1] > 0.9 * pages, "each block is mapped anew"
    assert count < 0.1 * pages


def test_a_user_who_chose_an_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    host_memory.keep_freed_memory.cache_clear()
    assert host_memory.keep_freed_memory() is False
    host_memory.keep_freed_memory.cache_clear()
