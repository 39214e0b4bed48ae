"""Detects a lost engine: it has failed, or its current step does not end."""

import asyncio
import logging

from app.engine.engine import Engine, EngineState

log = logging.getLogger(__name__)

LOOKS = 20  # in the given time, so that a loss is detected at most a twentieth of it too late


class Watchdog:
    """Checks the engine from the event loop. `lost` is done when the engine was never alive during `seconds`."""

    def __init__(self, engine: Engine, seconds: float | None) -> None:
        """The engine is not alive when `/livez` says so. If `seconds` is None, the engine is never lost."""
        self._engine, self._seconds = engine, seconds
        self._loop = asyncio.get_running_loop()
        self._stopped_at: float | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        """Starts the checks."""
        if self._seconds:
            self._look(self._seconds)

    def _look(self, seconds: float) -> None:
        now = self._loop.time()
        if self._engine.alive:
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now
            if self._engine.state is not EngineState.FAILED:  # a failed engine has logged its failure
                log.error("a step takes longer than UNFOG_WATCHDOG_SECONDS: the engine is stuck")
        if self._stopped_at is not None and now - self._stopped_at >= seconds:
            self.lost.set_result(None)
        else:
            self._loop.call_later(seconds / LOOKS, self._look, seconds)
