"""What the engine needs of a runner: its protocol, its errors, and what it says about the models that it serves."""

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
    """What is served under a name, in words and numbers."""

    name: str
    sha256: str
    num_parameters: int
    device: str
    dtype: str
    version: str
    compiled: bool
    num_classes: int
    max_steps: int
    steps: tuple[int, ...]  # the only numbers of steps that it draws in; () = all of 1..max_steps
    default_steps: int  # the recommended number
    samplers: tuple[Sampler, ...]  # the recommended one first
    guidance_scale: dict[Sampler, float]  # the recommended one of each
    guided_steps: Callable[[Sampler, int], range]  # (sampler, num_steps) -> the steps in which guidance acts
    guidable: bool  # whether labels were dropped in training: without it guidance has nothing to lean on

    def guided_steps_of(self, options: Options) -> range:
        """The steps of these images that take a second evaluation."""
        guided = options.guidance_scale != 1
        return self.guided_steps(options.sampler, options.num_steps) if guided else range(0)


class StepRunner(Protocol):
    """Computes; knows neither jobs nor threads. A call that raises has changed no row."""

    @property
    def models(self) -> dict[str, ModelInfo]:
        """What is served, by name; one is `default`."""

    @property
    def device_memory(self) -> Callable[[], int] | None:
        """Reads the bytes held on a GPU; None without one."""

    @property
    def network_seconds(self) -> float:
        """Time within the networks' calls until now."""

    def step(self, trajectories: list[Trajectory]) -> list[bool]:
        """One reverse step for each; True where its values are finite."""

    def pixels(self, trajectories: list[Trajectory]) -> list[Pixels]:
        """The images as they are predicted now."""

    def release(self, trajectories: list[Trajectory]) -> None:
        """Forgets their state."""

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Prepares for requests and measures the step times."""

    def check(self) -> None:
        """Draws the known picture of each model; raises if that fails or the picture differs."""
