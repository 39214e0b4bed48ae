"""The metrics that the engine writes. `app.metrics.Metrics` has them all.

They are a protocol, so that the engine runs without prometheus_client.
"""

from typing import Protocol


class Counted(Protocol):
    """A counter."""

    def inc(self, amount: float = 1) -> None:
        """Adds an amount."""


class Labelled(Protocol):
    """A counter with one label."""

    def labels(self, *values: str) -> Counted:
        """Returns the counter of a value of the label."""


class Observed(Protocol):
    """A histogram."""

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `count` equal values."""


class EngineMetrics(Protocol):
    """The metrics of the engine. `app/metrics.py` describes each of them."""

    @property
    def queue_wait(self) -> Observed:
        """In seconds."""

    @property
    def admission_wait(self) -> Observed:
        """In steps."""

    @property
    def step_duration(self) -> Observed:
        """In seconds."""

    @property
    def batch_rows(self) -> Observed:
        """In rows."""

    @property
    def denoise_steps(self) -> Counted:
        """In steps."""

    @property
    def network(self) -> Counted:
        """In seconds."""

    @property
    def images(self) -> Labelled:
        """By digit."""

    @property
    def cancelled(self) -> Labelled:
        """By stage."""
