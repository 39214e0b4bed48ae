"""The rate limit of each caller. Its memory is bounded, whatever the number of callers.

The package `limits` parses the limits. Its storage is not used, because it keeps every caller until the window ends and
starts a thread.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limits import RateLimitItem

from app.errors import RateLimited

MOST_CALLERS = 32_768  # whose requests are counted at the same time


@dataclass(slots=True)
class Window:
    """The requests in the present window of a limit and in the previous one. `number` counts windows on the clock."""

    number: int = 0
    present: int = 0
    previous: int = 0

    def advance(self, number: int) -> None:
        """Moves to the window of this number."""
        if number != self.number:
            self.previous = self.present if number == self.number + 1 else 0
            self.number, self.present = number, 0


class RateLimiter:
    """Applies the same limits to each caller. Only one thread may use it.

    The sliding window is the weighted sum of the present window and the previous one. If there are too many callers,
    the one whose last request is the oldest is removed.
    """

    def __init__(self, items: Sequence[RateLimitItem], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds and never goes back, unlike the time of day."""
        self._items, self._clock = items, clock
        self._windows: OrderedDict[str, list[Window]] = OrderedDict()

    def __len__(self) -> int:
        """Returns the number of callers whose requests are counted."""
        return len(self._windows)

    def spend(self, caller: str) -> None:
        """Counts one request; RateLimited, without counting it, if it exceeds any limit."""
        if not self._items:
            return
        now = self._clock()
        windows = self._windows.setdefault(caller, [Window() for _ in self._items])
        self._windows.move_to_end(caller)
        if len(self._windows) > MOST_CALLERS:
            self._windows.popitem(last=False)
        wait = max((_wait(item, window, now) for item, window in zip(self._items, windows, strict=True)), default=0.0)
        if wait > 0:
            raise RateLimited(math.ceil(wait))
        for window in windows:
            window.present += 1


def _wait(item: RateLimitItem, window: Window, now: float) -> float:
    """Returns the seconds until the limit permits one more request."""
    seconds = item.get_expiry()
    window.advance(int(now // seconds))
    left = seconds - now % seconds  # of the present window; the previous one counts with this share
    if window.previous * left / seconds + window.present < item.amount:
        return 0.0
    if window.present >= item.amount:  # they all count until the window ends
        return left
    return max(left - (item.amount - window.present) * seconds / window.previous, 1e-3)
