"""Tests of the watchdog with a fake event loop, whose clock only moves when a test advances it."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from app.engine.engine import Engine, EngineState
from app.engine.watchdog import Watchdog

SECONDS = 30.0


@dataclass
class FakeEngine:
    alive: bool = True
    state: EngineState = EngineState.OK


@dataclass
class FakeLoop:
    """Replaces the event loop of asyncio."""

    now: float = 1000.0
    calls: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def create_future(self) -> "Future[None]":
        return Future()

    def call_later(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> None:
        self.calls.append((self.now + seconds, callback, arguments))

    def advance(self, seconds: float) -> None:
        """Advances the clock and runs all callbacks that become due."""
        end = self.now + seconds
        while due := [call for call in self.calls if call[0] <= end]:
            for call in due:
                self.calls.remove(call)
                self.now = call[0]
                call[1](*call[2])
        self.now = end


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    loop = FakeLoop()
    monkeypatch.setattr("app.engine.watchdog.asyncio.get_running_loop", lambda: loop)
    return loop


def started_watchdog(engine: FakeEngine, seconds: float | None = SECONDS) -> Watchdog:
    watchdog = Watchdog(cast(Engine, engine), seconds)
    watchdog.start()
    return watchdog


def test_engine_is_lost_after_it_was_not_alive_during_the_timeout(loop: FakeLoop) -> None:
    watchdog = started_watchdog(FakeEngine(alive=False))
    loop.advance(SECONDS - 1)
    assert not watchdog.lost.done()
    loop.advance(2)
    assert watchdog.lost.done()


def test_lost_engine_is_detected_at_most_five_percent_of_the_timeout_late(loop: FakeLoop) -> None:
    engine = FakeEngine()
    watchdog = started_watchdog(engine)
    loop.advance(10 * SECONDS + 0.1)
    engine.alive = False
    loop.advance(SECONDS)
    assert not watchdog.lost.done()
    loop.advance(SECONDS / 20 + 0.1)
    assert watchdog.lost.done()


def test_timeout_starts_again_after_the_engine_was_alive(loop: FakeLoop) -> None:
    engine = FakeEngine(alive=False)
    watchdog = started_watchdog(engine)
    loop.advance(SECONDS - 1)
    engine.alive = True
    loop.advance(2)
    engine.alive = False
    loop.advance(SECONDS - 1)
    assert not watchdog.lost.done()
    loop.advance(3)
    assert watchdog.lost.done()


def test_checks_end_after_the_engine_is_lost(loop: FakeLoop) -> None:
    started_watchdog(FakeEngine(alive=False))
    loop.advance(2 * SECONDS)
    assert not loop.calls


def test_stuck_engine_is_logged_once_and_failed_engine_is_not_logged_again(
    loop: FakeLoop, caplog: pytest.LogCaptureFixture
) -> None:
    started_watchdog(FakeEngine(alive=False, state=EngineState.FAILED))
    loop.advance(SECONDS)
    assert not caplog.records
    started_watchdog(FakeEngine(alive=False))
    loop.advance(SECONDS)
    assert [record.message for record in caplog.records] == ["Engine stuck"]
    assert "UNFOG_WATCHDOG_SECONDS" in vars(caplog.records[0])["reason"]


def test_engine_is_never_lost_without_a_timeout(loop: FakeLoop) -> None:
    watchdog = started_watchdog(FakeEngine(alive=False), None)
    loop.advance(1e6)
    assert not watchdog.lost.done()
