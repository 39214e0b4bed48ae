"""Writes log lines to a file descriptor in a separate thread, from a queue that is bounded in bytes.

A full pipe makes its writer wait. Only the writing thread waits. Other threads append to the queue, and lines that do
not fit are dropped and counted. The standard library has no such queue: `queue.Queue` bounds the number of entries,
and `logging.handlers.QueueListener` cannot stop without waiting for its thread.
"""

import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_QUEUED_BYTES = 2**20
LINE_OVERHEAD_BYTES = 100  # of an entry in the queue, so that many short lines cannot use much more memory
FLUSH_SECONDS = 1.0  # an exit waits at most this long for the reader to take the queued lines
STALL_SECONDS = 0.25  # an exit stops waiting if the reader takes no line for this long


class LogWriter:
    """Queues lines and writes them in order. `put` never waits for the reader."""

    def __init__(self, descriptor: int, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.descriptor = descriptor
        self.num_dropped = 0  # lines, since the start
        self.describe_drop: Callable[[int], str] = lambda count: f"unfog: {count} log lines were dropped\n"
        self._max_queued_bytes = max_queued_bytes
        # Reentrant: a destructor or a signal handler may log while this thread holds it.
        self._condition = threading.Condition(threading.RLock())
        self._queue: deque[tuple[bytes, int]] = deque()  # a line, and how many dropped lines it reports
        self._queued_bytes = 0  # includes the line that is being written
        self._num_written = 0
        self._num_unreported = 0  # dropped lines that no line in the queue reports
        self._is_broken = False  # the last write failed
        self._has_torn_line = False  # it failed in the middle of a line
        self._writable = select.poll()
        self._writable.register(descriptor, select.POLLOUT)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, text: str) -> None:
        """Queues one or more whole lines, which are written together, or drops them if the queue is full."""
        line = text.encode("utf-8", "backslashreplace")
        size = len(line) + LINE_OVERHEAD_BYTES
        with self._condition:
            # Once full, the queue must be half empty again. Otherwise every second line would report a drop.
            limit = self._max_queued_bytes // 2 if self._num_unreported else self._max_queued_bytes
            if self._queued_bytes + size > limit:
                self.num_dropped += 1
                self._num_unreported += 1
                return
            if not self._is_broken:
                self._report_drops()
            self._append(line, 0)
            self._condition.notify_all()

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Waits until everything is written, at most `seconds`, and no longer than the reader takes lines."""
        deadline = time.monotonic() + seconds
        with self._condition:
            while self._has_work() and (left := deadline - time.monotonic()) > 0:
                before = self._num_written
                if not self._condition.wait_for(
                    lambda: not self._has_work() or self._num_written != before,  # noqa: B023 # called before the next turn
                    min(left, STALL_SECONDS),
                ):
                    return

    def _has_work(self) -> bool:
        return bool(self._queued_bytes or (self._num_unreported and not self._is_broken))

    def _append(self, line: bytes, num_reported: int) -> None:
        self._queue.append((line, num_reported))
        self._queued_bytes += len(line) + LINE_OVERHEAD_BYTES

    def _report_drops(self) -> None:
        if self._num_unreported:
            report = self.describe_drop(self._num_unreported)
            self._append(report.encode("utf-8", "backslashreplace"), self._num_unreported)
            self._num_unreported = 0

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._has_work())
                if not self._queue:  # the reader has caught up and there is no new line to put the report before
                    self._report_drops()
                line, num_reported = self._queue.popleft()
            is_written = self._write(line)  # without the lock: here the thread may wait for ever
            with self._condition:
                self._queued_bytes -= len(line) + LINE_OVERHEAD_BYTES
                self._num_written += is_written
                self._is_broken = not is_written
                if not is_written:
                    self.num_dropped += not num_reported
                    self._num_unreported += num_reported or 1
                self._condition.notify_all()

    def _write(self, line: bytes) -> bool:
        """Writes a whole line. Returns False if the write fails, for example because the reader is gone."""
        left = memoryview(b"\n" + line if self._has_torn_line else line)
        size = len(left)
        try:
            while left:
                try:
                    left = left[os.write(self.descriptor, left) :]
                except BlockingIOError:  # another process or without_waiting() has set O_NONBLOCK
                    self._writable.poll()
        except OSError:
            self._has_torn_line = self._has_torn_line or 0 < len(left) < size
            return False
        self._has_torn_line = False
        return True


def without_waiting(descriptor: int) -> None:
    """Makes writes to a pipe or a terminal fail instead of waiting, in this process and those that it starts.

    The log's own thread could wait. But C code that prints while it holds the GIL would stop every thread. Setting
    O_NONBLOCK would change the open file for all processes that share it, such as the shell. Therefore the descriptor
    becomes another open file of the same pipe. A socket cannot be opened again, and a pipe of another user possibly
    cannot. In these cases such C code still waits.
    """
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            return
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return
    os.dup2(own, descriptor)
    os.close(own)
