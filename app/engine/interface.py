"""The interface between the engine and a runner: the protocol, the errors, and the description of a served model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from app.engine.job import Options, Pixels, Trajectory
from app.engine.step_times import StepTimes
from model.sampler import Sampler


class RunnerError(Exception):
    """The service cannot start with this device or checkpoint. The message is one line for the operator."""


class OutOfMemoryError(Exception):
    """The device has too little memory for this batch. A smaller one may fit."""


class DeviceLostError(Exception):
    """The device no longer works. All state on it is lost."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The description of a served model."""

    name: str
    sha256: str
    num_parameters: int
    device: str
    dtype: str
    version: str
    compiled: bool
    num_classes: int
    max_steps: int
    steps: tuple[int, ...]  # the only permitted numbers of steps; () = all of 1..max_steps
    default_steps: int  # the recommended number
    samplers: tuple[Sampler, ...]  # the recommended one first
    guidance_scale: dict[Sampler, float]  # the recommended scale of each sampler
    guided_steps: Callable[[Sampler, int], range]  # (sampler, num_steps) -> the steps in which guidance acts
    guidable: bool  # True if labels were dropped in training, which guidance needs

    def guided_steps_of(self, options: Options) -> range:
        """Returns the steps of an image with these options that take a second evaluation."""
        guided = options.guidance_scale != 1
        return self.guided_steps(options.sampler, options.num_steps) if guided else range(0)


class StepRunner(Protocol):
    """Computes steps and keeps the state of rows. A call that raises has changed no row."""

    @property
    def models(self) -> dict[str, ModelInfo]:
        """Returns the served models by name. One of the names is `default`."""

    @property
    def device_memory(self) -> Callable[[], int] | None:
        """Returns a function that returns the bytes held on the GPU; None without a GPU."""

    @property
    def network_seconds(self) -> float:
        """Returns the seconds spent in calls of the networks so far."""

    def step(self, trajectories: list[Trajectory]) -> list[bool]:
        """Makes one reverse step of each row. Returns True for each row whose values are finite."""

    def pixels(self, trajectories: list[Trajectory]) -> list[Pixels]:
        """Returns the image that each row predicts now."""

    def release(self, trajectories: list[Trajectory]) -> None:
        """Releases the state of these rows."""

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Prepares for requests and measures the step times."""

    def check(self) -> None:
        """Draws the known picture of each model; raises if that fails or the picture differs."""
