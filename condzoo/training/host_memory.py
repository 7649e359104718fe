"""The C library's memory while a CPU trains: what a step frees stays with the process, for the next step."""

import ctypes
import functools
import os

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_INT = 2**31 - 1
CHOSEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # what a user who picks an allocator sets


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back to the system; False where that is not ours to do.

    A training step on a CPU asks for the same large blocks each time. By default glibc maps each of them anew,
    and every page of it is a fault that clears the page: a sixth of the time of CIFAR ResNet-20 (docs/training.md).
    The process keeps its largest footprint until it ends. Numbers are not touched.

    Once set it holds for the process. A system without glibc, or a user who set up an allocator by the environment
    (MALLOC_*, GLIBC_TUNABLES, LD_PRELOAD), is left alone.
    """
    if any(name.startswith(CHOSEN) for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (musl and macOS have no such function, and another malloc)
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_INT) and mallopt(M_TRIM_THRESHOLD, -1))
