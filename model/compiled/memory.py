"""Configures malloc so that the process keeps freed memory between steps."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # options of mallopt(3)
_THRESHOLD = 1 << 30  # bytes
_MAX_MMAP_THRESHOLD_OLD = 32 << 20  # bytes; the limit of glibc before 2.35


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next step. If the C library is not glibc on Linux, returns False.

    By default glibc takes blocks of more than 128 KiB from the kernel and returns them to it, so each step causes page
    faults for all its memory. All threads share one arena, because glibc returns the arenas of other threads to the
    kernel.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt:  # the C library is musl
        return False
    # glibc adapts this threshold until any option is set. Setting only the other options would be harmful.
    if not any(mallopt(_MMAP_THRESHOLD, limit) for limit in (_THRESHOLD, _MAX_MMAP_THRESHOLD_OLD)):
        return False
    limits = {_TRIM_THRESHOLD: _THRESHOLD, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}
    return all(mallopt(option, limit) for option, limit in limits.items())
