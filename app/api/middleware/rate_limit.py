"""Limits the request rate of each caller in this process, with bounded memory."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.errors import RateLimited
from app.settings import RateLimit

MAX_CALLERS = 32_768  # limit of callers whose counters are in memory


@dataclass(slots=True)
class Window:
    """Counts the requests in the current window `number` and in the previous one. Windows are numbered from time 0."""

    number: int = 0
    current: int = 0
    previous: int = 0

    def advance(self, number: int) -> None:
        """Moves to the window with this number."""
        if number != self.number:
            self.previous = self.current if number == self.number + 1 else 0
            self.number, self.current = number, 0


class RateLimiter:
    """Applies the same limits to each caller. Not thread-safe.

    Approximates a sliding window by a weighted sum of the current and the previous window. With more than MAX_CALLERS
    callers, the caller with the oldest last request is removed.
    """

    def __init__(self, limits: Sequence[RateLimit], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds and must be monotonic."""
        self._limits, self._clock = limits, clock
        self._windows: OrderedDict[str, list[Window]] = OrderedDict()

    def __len__(self) -> int:
        """Returns the number of callers with counters in memory."""
        return len(self._windows)

    def hit(self, caller: str) -> None:
        """Counts one request. If it would exceed a limit, raises RateLimited without counting it."""
        if not self._limits:
            return
        now = self._clock()
        windows = self._windows.setdefault(caller, [Window() for _ in self._limits])
        self._windows.move_to_end(caller)
        if len(self._windows) > MAX_CALLERS:
            self._windows.popitem(last=False)
        wait = max(_wait(limit, window, now) for limit, window in zip(self._limits, windows, strict=True))
        if wait > 0:
            raise RateLimited(math.ceil(wait))
        for window in windows:
            window.current += 1


def _wait(limit: RateLimit, window: Window, now: float) -> float:
    """Returns the seconds until the limit permits one more request."""
    window.advance(int(now // limit.seconds))
    return seconds_until_permitted(limit, window.previous, window.current, limit.seconds - now % limit.seconds)


def seconds_until_permitted(limit: RateLimit, previous: int, current: int, left: float) -> float:
    """Returns the seconds until the limit permits one more request.

    `previous` and `current` are the requests in the previous and in the current window, which ends in `left` seconds.
    """
    amount, seconds = limit
    # The weight of the previous window decreases from 1 to 0 during the current window.
    if previous * left / seconds + current < amount:
        return 0.0
    if current >= amount:  # requests of this window count until its end
        return left
    return max(left - (amount - current) * seconds / previous, 1e-3)
