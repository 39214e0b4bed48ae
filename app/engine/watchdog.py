"""Notices an engine that is lost: it has failed, or is in a step that does not end."""

import asyncio
import logging

from app.engine.engine import Engine, EngineState

log = logging.getLogger(__name__)

LOOKS = 20  # in the time that is given; what is noticed late is by a twentieth


class Watchdog:
    """Looks at the engine's heart from the event loop; `lost` is done when it has not beaten for `seconds` on end."""

    def __init__(self, engine: Engine, seconds: float | None) -> None:
        """The heart has stopped when `/livez` says so. With None no engine is ever lost."""
        self._engine, self._seconds = engine, seconds
        self._loop = asyncio.get_running_loop()
        self._stopped_at: float | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        """Looks from now on."""
        if self._seconds:
            self._look(self._seconds)

    def _look(self, seconds: float) -> None:
        now = self._loop.time()
        if self._engine.alive:
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now
            if self._engine.state is not EngineState.FAILED:  # that it has said itself
                log.error("a step takes longer than UNFOG_WATCHDOG_SECONDS: the engine is stuck")
        if self._stopped_at is not None and now - self._stopped_at >= seconds:
            self.lost.set_result(None)
        else:
            self._loop.call_later(seconds / LOOKS, self._look, seconds)
