"""What a step frees stays with the process: fewer page faults."""

import os
import resource
import subprocess
import sys
from pathlib import Path

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


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HEAP = f"""
import resource, runpy, sys
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (2**34, resource.RLIM_INFINITY))
def used(kind):
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(kind + ":"))
keep_freed_memory = runpy.run_path({host_memory.__file__!r})["keep_freed_memory"]
if sys.argv[1] != "plain" and not keep_freed_memory():
    sys.exit("another C library")
before = used("Rss")
block = b"x" * 100_000_000
print(used("AnonHugePages"), before)
"""


def huge_pages(how: str) -> tuple[int, int]:
    """kB in huge pages after 100 MB were asked for, and the kB in use before."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(host_memory.CHOSEN)}
    done = subprocess.run([sys.executable, "-c", HEAP, how], env=clean, capture_output=True, text=True)
    if done.stderr.strip() == "another C library":
        pytest.skip(done.stderr)
    done.check_returncode()
    found, before = done.stdout.split()
    return int(found), int(before)


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="the system does not leave huge pages to the program",
)
def test_the_heap_is_in_huge_pages_and_takes_no_memory_before_it_is_used() -> None:
    assert huge_pages("plain")[0] < 10_000
    found, before = huge_pages("kept")
    assert found > 80_000
    assert before < 100_000
    assert huge_pages("limited")[0] < 10_000, "addresses are limited: none are taken for this"


def test_a_user_who_chose_an_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    host_memory.keep_freed_memory.cache_clear()
    assert host_memory.keep_freed_memory() is False
    host_memory.keep_freed_memory.cache_clear()
