"""Rates: how many lines and images of a batch this process has answered per second in the last minute."""

import threading
import time
from collections import deque
from typing import NamedTuple

WINDOW_SECONDS = 60.0


class Rate(NamedTuple):
    """A number of lines and of images per second."""

    lines: float
    images: float


class Rates:
    """The rates of the batches. The event loop adds answers, and threads of the database read the rates."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers = dict[str, deque[tuple[float, int, int]]]()  # batch -> times with numbers of lines and images
        self._started = dict[str, float]()

    def start(self, batch_id: str) -> None:
        """Begins the measurement of a batch, unless it has begun."""
        with self._lock:
            self._started.setdefault(batch_id, time.monotonic())
            self._answers.setdefault(batch_id, deque())

    def add(self, batch_id: str, lines: int, images: int) -> None:
        """Counts lines that were answered, and the images of all of them."""
        now = time.monotonic()
        with self._lock:
            if batch_id in self._started:
                answers = self._answers[batch_id]
                answers.append((now, lines, images))
                _forget(answers, now)

    def of(self, batch_id: str) -> Rate | None:
        """Returns the rate, or None if this process has answered no line in the last minute."""
        now = time.monotonic()
        with self._lock:
            answers = self._answers.get(batch_id)
            if answers is not None:
                _forget(answers, now)
            if not answers:
                return None
            seconds = min(WINDOW_SECONDS, max(now - self._started[batch_id], 1e-3))
            return Rate(sum(lines for _, lines, _ in answers) / seconds, sum(n for _, _, n in answers) / seconds)

    def end(self, batch_id: str) -> None:
        """Forgets a batch."""
        with self._lock:
            self._started.pop(batch_id, None)
            self._answers.pop(batch_id, None)


def _forget(answers: deque[tuple[float, int, int]], now: float) -> None:
    while answers and answers[0][0] <= now - WINDOW_SECONDS:
        answers.popleft()
