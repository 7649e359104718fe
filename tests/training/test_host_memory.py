"""What a step frees stays with the process: fewer page faults."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable

import pytest
import torch

from condzoo.training.host_memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

BLOCKS, STEPS, BYTES = 8, 4, 4_000_000


def faults_after(setting: Callable[[], object]) -> int:
    """Page faults of some steps that each ask for the same blocks, in a process of its own with that setting."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        setting()
        counts = []
        for _ in range(STEPS + 1):
            blocks = [torch.ones(BYTES // 4) for _ in range(BLOCKS)]
            del blocks
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        os.write(writing, str(counts[-1] - counts[0]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    found = int(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    return found


def usual() -> None:
    """glibc's own thresholds, whatever was set before."""
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    assert mallopt(M_TRIM_THRESHOLD, 128 * 1024)


def kept() -> None:
    """A fresh call: an earlier one of this process may have been answered from the cache."""
    keep_freed_memory.cache_clear()
    keep_freed_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    if not keep_freed_memory():
        pytest.skip("another allocator")
    pages = STEPS * BLOCKS * BYTES // resource.getpagesize()
    assert faults_after(usual) > 0.9 * pages, "each block is mapped anew"
    assert faults_after(kept) < 0.1 * pages


def test_a_user_who_chose_an_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    keep_freed_memory.cache_clear()
    assert keep_freed_memory() is False
    keep_freed_memory.cache_clear()
