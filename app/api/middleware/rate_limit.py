"""How often each caller may come, by the library `limits`, in memory that callers cannot make grow."""

import math
import time
from collections import OrderedDict
from collections.abc import Sequence

from limits import RateLimitItem
from limits.storage import MemoryStorage, Storage
from limits.strategies import SlidingWindowCounterRateLimiter

from app.errors import RateLimited

MOST_WINDOWS = 65_536  # that are remembered; a caller has two for each limit


class Windows(MemoryStorage):
    """The library's own keeps every key until it expires, and has a thread look at all of them after each request.

    Here the window that was used least lately goes when there are too many: then its caller begins anew.
    """

    STORAGE_SCHEME = ["windows"]  # noqa: RUF012 # one of its own, as the library asks

    def __init__(self) -> None:
        Storage.__init__(self)  # without the thread
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # and when each expires

    def __len__(self) -> int:
        return len(self._counts)

    def get(self, key: str) -> int:
        """Requests in a window."""
        count, expires_at = self._counts.get(key, (0, 0.0))
        return count if expires_at > time.time() else 0

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Counts one; the window lasts for so long from its first."""
        count = self.get(key)
        expires_at = self._counts[key][1] if count else time.time() + expiry
        self._counts[key] = count + amount, expires_at
        self._counts.move_to_end(key)
        if len(self._counts) > MOST_WINDOWS:
            self._counts.popitem(last=False)
        return count + amount


class Rates:
    """For each caller the same; a window slides as the weighted sum of the present one and the last. One thread's."""

    def __init__(self, items: Sequence[RateLimitItem]) -> None:
        self._items, self.windows = items, Windows()
        self._limiter = SlidingWindowCounterRateLimiter(self.windows)

    def spend(self, caller: str) -> None:
        """Counts one request; RateLimited, and nothing counted, where it is one too many for any limit."""
        wait = max((self._seconds_until_one_more(item, caller) for item in self._items), default=0.0)
        if wait > 0:
            raise RateLimited(math.ceil(wait))
        for item in self._items:
            self._limiter.hit(item, caller)

    def _seconds_until_one_more(self, item: RateLimitItem, caller: str) -> float:
        """Until previous * share of it that still counts + present < amount."""
        window = item.get_expiry()
        previous, left, present, expiry = self.windows.get_sliding_window(item.key_for(caller), window)
        if previous * left / window + present < item.amount:
            return 0.0
        if present >= item.amount:
            return max(expiry - window, 1e-3)  # the present one counts whole until it ends
        return max(left - (item.amount - present) * window / previous, 1e-3)
