"""The rate limit of each caller, in memory that is bounded whatever the number of callers.

`limits` parses the limits. Its own storage keeps every caller until its window ends, and starts a thread.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from limits import RateLimitItem

from app.errors import RateLimited

MOST_CALLERS = 32_768  # whose requests are remembered


@dataclass(slots=True)
class Window:
    """Requests in the present window of a limit and in the one before it. `number` counts windows since 1970."""

    number: int = 0
    present: int = 0
    previous: int = 0

    def advance(self, number: int) -> None:
        """Goes on to the window of this number."""
        if number != self.number:
            self.previous = self.present if number == self.number + 1 else 0
            self.number, self.present = number, 0


class RateLimiter:
    """Applies the same limits to each caller. Used by one thread.

    The sliding window is the weighted sum of the present window and the one before it. When there are too many callers,
    the one that came least lately is forgotten.
    """

    def __init__(self, items: Sequence[RateLimitItem]) -> None:
        self._items = items
        self._windows: OrderedDict[str, list[Window]] = OrderedDict()

    def __len__(self) -> int:
        """Returns the number of callers that are remembered."""
        return len(self._windows)

    def spend(self, caller: str) -> None:
        """Counts one request. RateLimited if it is one too many for any limit; then nothing is counted."""
        now = time.time()
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
