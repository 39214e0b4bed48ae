"""The results of a measurement: figures with units, targets and checks."""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.engine.interface import DeviceLostError

NO_GPU = "no GPU"
RATES = {"16 x 64, guidance off": 5000, "16 x 64, default guidance": 3000}  # targets of loads, in images/s


class Skipped(Exception):
    """A measurement cannot run here. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of all measurements."""

    checkpoint: Path | None = None  # None: the shipped checkpoints
    device: str = "auto"  # a value of UNFOG_DEVICE
    dtype: str = "auto"  # a value of UNFOG_DTYPE


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the measurements of latencies and loads, in process and over HTTP."""

    num_images: int  # images that are measured one after the other. The same number is generated first, unmeasured.
    loads: tuple[tuple[int, int], ...]  # (number of clients, images of each request)
    settle_seconds: float  # duration of a load before its rate is measured
    seconds: float  # duration of the measurement of the rate
    # Pause after a first load that is not measured. In it, the graphs for the load are captured. 0: no first load.
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class Target:
    """The value that a figure should reach."""

    limit: float
    is_at_most: bool = True  # False: the value must be at least the limit

    def is_met(self, value: float) -> bool:
        """Returns True if the value reaches the target."""
        return value <= self.limit if self.is_at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'at most' if self.is_at_most else 'at least'} {self.limit:g}"


READY = Target(20.0)  # seconds from the start of the process until it is ready


@dataclass(frozen=True, slots=True)
class Figure:
    """One result. `passed` is the result of a check, and None for a figure that is not a check."""

    name: str
    value: float | str | None = None
    unit: str = ""
    target: Target | None = None
    passed: bool | None = None
    skipped: str = ""  # the reason why there is no value
    detail: dict[str, float] = field(default_factory=dict)  # further values in this unit, only for the JSON file

    def as_json(self) -> dict[str, Any]:
        """Returns the figure without its empty fields."""
        content: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit, "skipped": self.skipped}
        content |= {"detail": self.detail}
        if self.target and isinstance(self.value, float | int):
            content |= {"target": str(self.target), "met": self.target.is_met(self.value)}
        if self.passed is not None:
            content["passed"] = self.passed
        return {name: value for name, value in content.items() if value not in (None, "", {})}


@dataclass(slots=True)
class Check:
    """The outcome of a block of code that must not raise an error."""

    name: str
    error: str = ""

    @property
    def figure(self) -> Figure:
        """Returns the result of the check."""
        return Figure(self.name, self.error or "ok", passed=not self.error)


def guarded(name: str, figures: Iterable[Figure]) -> Iterator[Figure]:
    """Yields the figures. An error becomes a failed check with this name, so that further figures can follow.

    After DeviceLostError no further figures are possible, so this error is raised.
    """
    try:
        yield from figures
    except (Skipped, DeviceLostError):
        raise
    except Exception as error:
        traceback.print_exc()
        yield Figure(name, error_line(error), passed=False)


@contextmanager
def checked(name: str) -> Iterator[Check]:
    """Yields a check that fails if the block raises an error. The error does not leave the block."""
    check = Check(name)
    try:
        yield check
    except Exception as error:
        check.error = error_line(error)


def error_line(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
