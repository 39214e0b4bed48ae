"""The states of the engine, and what a request is told in each."""

from enum import StrEnum

from app import errors

STARTING_SECONDS = 5  # Retry-After where no backlog tells it: about what loading takes,
RESTART_SECONDS = 10  # and what a restart takes


class EngineState(StrEnum):
    """New work is taken only while it is `ok`."""

    STARTING = "starting"
    OK = "ok"
    DRAINING = "draining"
    FAILED = "failed"

    def refuse_unless_ok(self) -> None:
        """Starting, Draining or EngineFailed where no new work is taken."""
        if self is EngineState.STARTING:
            raise errors.Starting(STARTING_SECONDS)
        if self is EngineState.DRAINING:
            raise errors.Draining(RESTART_SECONDS)
        if self is EngineState.FAILED:
            raise errors.EngineFailed(RESTART_SECONDS)
