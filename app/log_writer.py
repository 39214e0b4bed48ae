"""Writes log lines to a file descriptor in a separate thread, from a queue that is bounded in bytes.

A write to a full pipe blocks only the writing thread. Other threads append to the queue. If the queue is full, the line
is dropped and counted. The standard library has no such queue: `queue.Queue` limits the number of entries, not
their size, and `logging.handlers.QueueListener` cannot stop without joining its thread.
"""

import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

MAX_QUEUED_BYTES = 2**20
LINE_OVERHEAD_BYTES = 100  # added per line, so that many short lines cannot exceed the memory limit
FLUSH_SECONDS = 1.0  # maximum time that an exit waits for the queued lines
STALL_SECONDS = 0.25  # an exit stops waiting if no line is written for this time
# After the first line, the thread waits for this time and then writes all lines together. Waking the thread for each
# line would take longer than writing the line.
COLLECT_SECONDS = 0.01
MAX_WRITE_BYTES = 2**16  # limit for lines that are written together; a pipe holds as many bytes


class LogWriter:
    """Queues lines and writes them in order. `put` never blocks on the file descriptor."""

    def __init__(self, descriptor: int, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.descriptor = descriptor
        self.num_dropped = 0  # total number of dropped lines
        self.describe_drop: Callable[[int], str] = lambda count: f"unfog: {count} log lines were dropped\n"
        self._max_queued_bytes = max_queued_bytes
        # The lock is reentrant, because a destructor or a signal handler can log while its thread holds the lock.
        self._condition = threading.Condition(threading.RLock())
        self._queue: deque[tuple[bytes, int]] = deque()  # (line, number of dropped lines that it reports)
        self._queued_bytes = 0  # includes the line that is being written
        self._num_written = 0
        self._num_unreported = 0  # dropped lines that are not yet reported by a queued line
        self._is_broken = False  # True if the last write failed
        self._has_torn_line = False  # True if a write failed in the middle of a line
        self._writable = select.poll()
        self._writable.register(descriptor, select.POLLOUT)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, text: str) -> None:
        """Queues one or more whole lines, which are written together. Drops them if the queue is full."""
        line = text.encode("utf-8", "backslashreplace")
        size = len(line) + LINE_OVERHEAD_BYTES
        with self._condition:
            # After a drop, wait until the queue is half empty. Otherwise every second line would report a drop.
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
        """Waits at most `seconds` until all lines are written. Returns earlier if none is written in STALL_SECONDS."""
        deadline = time.monotonic() + seconds
        with self._condition:
            while self._has_work() and (left := deadline - time.monotonic()) > 0:
                before = self._num_written
                if not self._condition.wait_for(
                    lambda: not self._has_work() or self._num_written != before,  # noqa: B023 # called within this iteration
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

    def _wait_for_work(self) -> None:
        """Returns at once while there is work. Otherwise waits for work, and then for further lines."""
        with self._condition:
            if self._has_work():
                return
            self._condition.wait_for(self._has_work)
        time.sleep(COLLECT_SECONDS)

    def _run(self) -> None:
        while True:
            self._wait_for_work()
            with self._condition:
                if not self._queue:  # All lines are written. Report the drops without waiting for the next line.
                    self._report_drops()
                lines = self._take_lines()
            num_written = self._write([line for line, _ in lines])  # It can block forever, so the lock is not held.
            with self._condition:
                self._num_written += num_written
                self._is_broken = num_written < len(lines)
                if self._is_broken:  # One line is lost. The lines after it are tried again.
                    _, num_reported = lines[num_written]
                    self.num_dropped += not num_reported
                    self._num_unreported += num_reported or 1
                    self._queue.extendleft(reversed(lines[num_written + 1 :]))
                self._queued_bytes -= sum(len(line) + LINE_OVERHEAD_BYTES for line, _ in lines[: num_written + 1])
                self._condition.notify_all()

    def _take_lines(self) -> list[tuple[bytes, int]]:
        """Removes and returns the first line of the queue, and the next ones up to MAX_WRITE_BYTES together."""
        lines, size = list[tuple[bytes, int]](), 0
        while self._queue and (not lines or size + len(self._queue[0][0]) <= MAX_WRITE_BYTES):
            lines.append(self._queue.popleft())
            size += len(lines[-1][0])
        return lines

    def _write(self, lines: list[bytes]) -> int:
        """Writes whole lines. Returns the number of lines before a failure, for example because the pipe was closed."""
        start = b"\n" if self._has_torn_line else b""
        content, done = memoryview(start + b"".join(lines)), 0
        with suppress(OSError):
            while done < len(content):
                try:
                    done += os.write(self.descriptor, content[done:])
                except BlockingIOError:  # O_NONBLOCK was set by another process or by make_nonblocking()
                    self._writable.poll()
        done -= len(start)
        for number, line in enumerate(lines):
            if done < len(line):
                self._has_torn_line = done > 0 or (self._has_torn_line and number == 0)
                return number
            done -= len(line)
        self._has_torn_line = False
        return len(lines)


def make_nonblocking(descriptor: int) -> None:
    """Makes writes to a full pipe or terminal fail instead of blocking, in this process and its child processes.

    C code that prints while it holds the GIL would otherwise block all threads. Setting O_NONBLOCK on the descriptor
    would also affect the other processes that share the open file, such as the shell. Therefore the pipe is opened
    again and the new open file replaces the descriptor. Sockets, and some pipes of other users, cannot be opened again.
    Writes to them still block.
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
