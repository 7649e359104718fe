"""The C library's memory while a CPU trains: what a step frees stays with the process, in huge pages if possible."""

import ctypes
import functools
import os

# glibc's malloc.h; Linux's mman.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MADV_HUGEPAGE = 14
LARGEST_INT = 2**31 - 1
CHOSEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # what a user who picks an allocator sets
HUGE_PAGE = 2**21  # bytes, on x86-64 and most of arm64
GROWTH = 2**30  # bytes the heap is grown by at once; above M_MMAP_THRESHOLD a block would not be of the heap


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back to the system; False where that is not ours to do.

    A training step on a CPU asks for the same large blocks each time. By default glibc maps each of them anew,
    and every page of it is a fault that clears the page: a sixth of the time of CIFAR ResNet-20 (docs/training.md).
    The process keeps its largest footprint until it ends. The heap is also put into huge pages. Numbers are not
    touched.

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
    kept = bool(mallopt(M_MMAP_THRESHOLD, LARGEST_INT) and mallopt(M_TRIM_THRESHOLD, -1))
    if kept:
        use_huge_pages(library)
    return kept


def use_huge_pages(library: ctypes.CDLL) -> None:
    """Have the heap in huge pages, where the system leaves that to the program (transparent_hugepage: madvise).

    The heap is grown by a quarter of the machine's memory, 4 GiB at most, and freed again, which with
    M_TRIM_THRESHOLD off keeps the addresses. Addresses are all that is taken; memory follows as it is used.
    Where a user limits addresses (`ulimit -v`, `-d`) it is left out: they are needed elsewhere.
    """
    import resource  # not there on Windows

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes, library.free.restype = [ctypes.c_void_p], None
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    blocks = []
    for _ in range(min(memory // 4, 2**32) // GROWTH):
        block = library.malloc(GROWTH)
        if not block:  # strict overcommit
            break
        blocks.append(block)
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        library.madvise(start, block + GROWTH - start, MADV_HUGEPAGE)  # refused: pages stay as they are
    for block in blocks:
        library.free(block)
