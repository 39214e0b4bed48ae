"""Lowers the priority of threads, so that the threads of the denoising steps get more CPU time."""

import os
import sys
import threading
from contextlib import suppress

NICENESS = 5  # added to that of the process


def lower_priority() -> None:
    """Gives the calling thread a lower priority, unless a sandbox forbids it.

    Only Linux has a niceness for each thread.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
