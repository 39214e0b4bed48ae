"""The service with fault injection: `python -m tests.e2e.faulty_service`, configured like the service.

The seed of a request selects the fault and the step before which it happens: FAULTS[kind] + 1000 + step. Only the
runner is replaced. Responses, fault isolation and the watchdog are those of the service.
"""

import ctypes
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import uvicorn

import app.main
import app.runner.load
from app.__main__ import main
from app.engine.interface import DeviceLostError, OutOfMemoryError
from app.engine.job import StepRows, Trajectory
from app.engine.step_loop import StepLoop
from app.engine.step_times import StepTimes
from app.runner.runner import Runner

log = logging.getLogger(__name__)

KINDS = ("exception", "nan", "memory", "lost", "stuck", "noise", "print in C", "broken")
FAULTS = {kind: place * 10**9 for place, kind in enumerate(KINDS, 1)}
MEMORY_ROWS = 6  # a step with a "memory" row and more rows than this raises OutOfMemoryError
STUCK_SECONDS = 3600.0


def fault_at(trajectory: Trajectory) -> str | None:
    """Returns the kind of the fault to inject before this row's next step."""
    kind, step = divmod(trajectory.job.request.options.seed, 10**9)
    names = {number // 10**9: name for name, number in FAULTS.items()}
    return names.get(kind) if step == 1000 + trajectory.step else None


def fault_seed(kind: str, step: int) -> int:
    """Returns the seed that injects a fault of this kind before this step."""
    return FAULTS[kind] + 1000 + step


class FaultyRunner(Runner):
    """Injects the fault that the seed of a row selects before the step."""

    is_broken = False

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """If SLOW_WARM_UP is set, logs a line and waits until the start is interrupted."""
        if "SLOW_WARM_UP" in os.environ:
            log.warning("warming up")
            while not should_stop():
                threading.Event().wait(0.01)
        return super().warm_up(should_stop)

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Injects the faults of these rows, then runs the step."""
        trajectories = rows.trajectories
        for trajectory in trajectories:
            fault = fault_at(trajectory)
            self.is_broken = self.is_broken or fault == "broken"
            if fault == "exception":
                raise ZeroDivisionError("an internal detail")
            if fault == "memory" and len(trajectories) > MEMORY_ROWS:
                raise OutOfMemoryError
            if fault == "lost":
                raise DeviceLostError("the device is gone")
            if fault == "stuck":
                threading.Event().wait(STUCK_SECONDS)
            if fault == "noise":
                make_noise()
            if fault == "print in C":
                ctypes.PyDLL(None).write(2, b"c" * 999 + b"\n", 1000)  # holds the interpreter's lock during the fault
            if fault == "nan" and trajectory.slots:
                with torch.inference_mode():
                    self._slots.state.x_t[list(trajectory.slots)] = float("nan")
        if self.is_broken:
            raise ZeroDivisionError("an internal detail")
        return super().step(rows, before_call)


class Unraisable:
    """Raises an exception that no caller can catch."""

    def __del__(self) -> None:
        raise LookupError("in a destructor")


def make_noise() -> None:
    """Writes to stderr in every way that Python code can, except through logging."""
    print("a print", "of two words", file=sys.stderr)
    print("a print without a newline", file=sys.stderr, end="", flush=True)
    warnings.warn("a warning", stacklevel=1)
    thread = threading.Thread(target=lambda: [][1])
    thread.start()
    thread.join()
    Unraisable()


def _fail(*args: Any) -> None:
    raise RuntimeError("can't start new thread")


if __name__ == "__main__":
    if os.environ.get("FAULT_AT_START") == "lifespan":
        StepLoop.start = _fail  # type: ignore[method-assign]
    if os.environ.get("FAULT_AT_START") == "server":
        uvicorn.Config.load = _fail  # type: ignore[method-assign]
    app.runner.load.Runner = FaultyRunner  # type: ignore[misc] # what load_runner creates
    app.main.STOP_SECONDS = 0.5  # a stuck step does not end
    main()
