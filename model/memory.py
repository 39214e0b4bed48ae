"""How the process keeps memory between steps."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # mallopt(3)
_KEEP = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Lets glibc keep what a step frees for the next one; False where the C library is another.

    By default blocks of more than 128 KiB come from the kernel and go back to it: each step would fault in all
    its pages anew. One arena for all threads, since those of other threads are given back whole.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt:  # musl
        return False
    limits = {_MMAP_THRESHOLD: _KEEP, _TRIM_THRESHOLD: _KEEP, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}
    taken = [mallopt(option, limit) for option, limit in limits.items()]  # 1 each where it is
    return all(taken)
