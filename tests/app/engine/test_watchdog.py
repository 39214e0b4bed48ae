"""On a clock of its own: no test waits, and no noise of the machine is seen."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from app.engine.engine import Engine, EngineState
from app.engine.watchdog import Watchdog

SECONDS = 30.0


@dataclass
class Heart:
    alive: bool = True
    state: EngineState = EngineState.OK


@dataclass
class Loop:
    """Stands where the event loop stood."""

    now: float = 1000.0
    calls: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def create_future(self) -> "Future[None]":
        return Future()

    def call_later(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> None:
        self.calls.append((self.now + seconds, callback, arguments))

    def advance(self, seconds: float) -> None:
        """Time passes, and what is due is called."""
        end = self.now + seconds
        while due := [call for call in self.calls if call[0] <= end]:
            for call in due:
                self.calls.remove(call)
                self.now = call[0]
                call[1](*call[2])
        self.now = end


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr("app.engine.watchdog.asyncio.get_running_loop", lambda: loop)
    return loop


def watched(heart: Heart, seconds: float | None = SECONDS) -> Watchdog:
    watchdog = Watchdog(cast(Engine, heart), seconds)
    watchdog.start()
    return watchdog


def test_a_heart_that_has_stopped_for_the_whole_time_is_lost(loop: Loop) -> None:
    watchdog = watched(Heart(alive=False))
    loop.advance(SECONDS - 1)
    assert not watchdog.lost.done()
    loop.advance(2)
    assert watchdog.lost.done()


def test_a_heart_that_stops_later_is_lost_a_twentieth_later_at_most(loop: Loop) -> None:
    heart = Heart()
    watchdog = watched(heart)
    loop.advance(10 * SECONDS + 0.1)
    heart.alive = False
    loop.advance(SECONDS)
    assert not watchdog.lost.done()
    loop.advance(SECONDS / 20 + 0.1)
    assert watchdog.lost.done()


def test_a_heart_that_beats_again_has_all_of_its_time_again(loop: Loop) -> None:
    heart = Heart(alive=False)
    watchdog = watched(heart)
    loop.advance(SECONDS - 1)
    heart.alive = True
    loop.advance(2)
    heart.alive = False
    loop.advance(SECONDS - 1)
    assert not watchdog.lost.done()
    loop.advance(3)
    assert watchdog.lost.done()


def test_nothing_is_looked_at_after_it_is_lost(loop: Loop) -> None:
    watched(Heart(alive=False))
    loop.advance(2 * SECONDS)
    assert not loop.calls


def test_what_is_stuck_is_said_once_and_what_failed_has_said_it_itself(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    watched(Heart(alive=False, state=EngineState.FAILED))
    loop.advance(SECONDS)
    assert not caplog.records
    watched(Heart(alive=False))
    loop.advance(SECONDS)
    assert [record.message for record in caplog.records] == [
        "a step takes longer than UNFOG_WATCHDOG_SECONDS: the engine is stuck"
    ]


def test_with_never_nothing_is_lost(loop: Loop) -> None:
    watchdog = watched(Heart(alive=False), None)
    loop.advance(1e6)
    assert not watchdog.lost.done()
