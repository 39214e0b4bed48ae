"""The protocol of the metrics that the engine writes. With it, the engine does not need prometheus_client."""

from typing import Protocol


class Counted(Protocol):
    """A counter."""

    def inc(self, amount: float = 1) -> None:
        """Adds an amount."""


class Labelled(Protocol):
    """A counter with labels."""

    def labels(self, *values: str) -> Counted:
        """Returns the counter for these values of the labels."""


class Observed(Protocol):
    """A histogram."""

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `count` equal values."""


class EngineMetrics(Protocol):
    """The metrics of the engine. `app.metrics.Metrics` has all of them and describes them."""

    @property
    def queue_wait(self) -> Observed:
        """Returns the histogram of the wait for the first step, in seconds."""

    @property
    def admission_wait(self) -> Observed:
        """Returns the histogram of the wait for the first step, in steps."""

    @property
    def step_duration(self) -> Observed:
        """Returns the histogram of the duration of a step, in seconds."""

    @property
    def batch_rows(self) -> Observed:
        """Returns the histogram of the batch size of a step, in rows."""

    @property
    def denoise_steps(self) -> Counted:
        """Returns the counter of steps."""

    @property
    def network(self) -> Counted:
        """Returns the counter of the seconds in network calls."""

    @property
    def images(self) -> Labelled:
        """Returns the counter of images by digit and by the name of the class."""

    @property
    def cancelled(self) -> Labelled:
        """Returns the counter of cancelled images by stage."""
