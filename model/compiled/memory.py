"""How the process keeps memory between steps."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # mallopt(3)
_KEEP = 1 << 30  # bytes
_MOST_OF_OLD_GLIBC = 32 << 20  # bytes, before 2.35


def keep_freed_memory() -> bool:
    """Lets glibc keep what a step frees for the next one; False, and nothing changed, where the C library cannot.

    By default blocks of more than 128 KiB come from the kernel and go back to it: each step would fault in all
    its pages anew. One arena for all threads, since those of other threads are given back whole.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt:  # musl
        return False
    # Any option switches off that the threshold adapts itself: without this one the others would do harm.
    if not any(mallopt(_MMAP_THRESHOLD, limit) for limit in (_KEEP, _MOST_OF_OLD_GLIBC)):
        return False
    limits = {_TRIM_THRESHOLD: _KEEP, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}
    return all(mallopt(option, limit) for option, limit in limits.items())
