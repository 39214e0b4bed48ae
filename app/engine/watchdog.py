"""The watchdog: detects an engine that has failed, or whose current step does not end.

Two timeouts are involved. After `UNFOG_WATCHDOG_SECONDS` in one step the engine is not alive, and `/livez` returns 503.
After a further `UNFOG_GIVE_UP_SECONDS` the engine is lost, and the process exits with status 1 so that its supervisor
restarts it.

Example with the defaults of 10 s and 30 s: a step hangs. `/livez` returns 503 after 10 s, and the process exits after
about 40 s. If the step ends after 35 s, the engine continues.
"""

import asyncio
import logging

from app.engine.engine import Engine, EngineState

log = logging.getLogger(__name__)

CHECKS = 20  # number of checks in one timeout, so that the delay is at most 5% of the timeout


class Watchdog:
    """Checks the engine regularly from the event loop.

    `lost` completes when all checks during the timeout have found that the engine is not alive.
    """

    def __init__(self, engine: Engine, seconds: float | None) -> None:
        """`seconds` is the timeout. If it is None, the engine is never lost."""
        self._engine, self._seconds = engine, seconds
        self._loop = asyncio.get_running_loop()
        self._not_alive_since: float | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        """Starts the checks, unless the timeout is None."""
        if self._seconds:
            self._check(self._seconds)

    def _check(self, seconds: float) -> None:
        now = self._loop.time()
        if self._engine.alive:
            self._not_alive_since = None
        elif self._not_alive_since is None:
            self._not_alive_since = now
            if self._engine.state is not EngineState.FAILED:  # The engine has already logged that it failed.
                log.error("Engine stuck", extra={"reason": "a step takes longer than UNFOG_WATCHDOG_SECONDS"})
        if self._not_alive_since is not None and now - self._not_alive_since >= seconds:
            self.lost.set_result(None)
        else:
            self._loop.call_later(seconds / CHECKS, self._check, seconds)
