"""Memory settings of a process that computes steps: keeps freed memory for the next step, within limits."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # options of mallopt(3)
_THRESHOLD, _PAD = 1 << 30, 64 << 20  # bytes
_MAX_MMAP_THRESHOLD_OLD = 32 << 20  # bytes; the limit of glibc before 2.35
# The step of the shipped network has 12 different convolutions, so this is enough for 32 numbers of evaluations.
MAX_PRIMITIVES = 384


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
    limits = {_TRIM_THRESHOLD: _THRESHOLD, _TOP_PAD: _PAD, _ARENA_MAX: 1}
    return all(mallopt(option, limit) for option, limit in limits.items())


def return_freed_memory() -> None:
    """Returns freed memory to the kernel, except 64 MiB at the end of the heap. Does nothing without glibc.

    Call it after many steps. oneDNN allocates the convolutions that it compiles between the tensors of a step. They
    stay there when the tensors are freed, so that larger tensors do not fit into the gaps. Without this call, memory
    grows with each new batch size, because all gaps stay in memory.
    """
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(ctypes.c_size_t(_PAD))


def limit_primitives() -> None:
    """Limits oneDNN's cache of compiled convolutions, unless the user has set a limit. Call it before the first step.

    oneDNN compiles each convolution for each number of evaluations and of threads. It keeps the last 1,024 by default,
    of 0.08 MB each (Xeon with AMX). With rare batch sizes, memory would thus grow by 80 MB, slowly over hours. oneDNN
    reads the variable when it compiles for the first time.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(MAX_PRIMITIVES))
