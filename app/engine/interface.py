"""The interface between engine and runner: the protocol, its errors, and the description of a served model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from app.engine.job import Options, Pixels, StepRows, StepSet, Trajectory
from app.engine.step_times import StepTimes
from model.recognition import Readout
from model.spec import ModelSpec

T = TypeVar("T", covariant=True)
Embeddings = npt.NDArray[np.float32]  # (N, E), each row of length 1


class RunnerError(Exception):
    """The service cannot start with this device or checkpoint. The message is one line that the operator sees."""


class OutOfMemoryError(Exception):
    """The device does not have enough memory for this batch. A smaller batch may fit."""


class DeviceLostError(Exception):
    """The device no longer works. All state on it is lost."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo(ModelSpec):
    """A served model: its specification, and the values that depend on its file, its weights and the device."""

    name: str
    sha256: str  # of the checkpoint file
    num_parameters: int
    device: str
    dtype: str
    version: str
    compiled: bool
    guided_steps: Callable[[Options], StepSet]  # the steps in which guidance is applied if its scale is not 1
    clip_steps: Callable[[Options], StepSet]  # the steps in which CLIP guidance is applied if its scale is not 0
    readout: Readout  # the constants with which the model recognises images

    @property
    def spec(self) -> ModelSpec:
        """The specification alone. It equals that of the checkpoint file."""
        return ModelSpec(**{field.name: getattr(self, field.name) for field in fields(ModelSpec)})

    def guided_steps_of(self, options: Options, *, has_label: bool = False) -> StepSet:
        """Returns the steps of an image with these options that need a second evaluation.

        Without a label there is no guidance, because the unconditional prediction is used in every step. `has_label`
        is True if a search finds the label before these steps begin.
        """
        is_guided = options.guidance_scale != 1 and (has_label or options.label is not None)
        return self.guided_steps(options) if is_guided else range(0)


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """The description of the loaded CLIP model."""

    name: str  # contains no path of the server
    sha256: str  # digest of the weights


class ClipEmbedder(Protocol):
    """Embeds prompts and images with a CLIP model. The dot product of two embeddings is their cosine similarity."""

    @property
    def info(self) -> ClipInfo:
        """Returns the description of the model."""

    @property
    def known(self) -> Mapping[str, npt.NDArray[np.float32]]:
        """Returns the embeddings (E,) of the prompts that were embedded at the start."""

    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Returns the embeddings (P, E) of the prompts. Words after the model's context length are ignored."""

    def embed_images(self, images: Sequence[Pixels]) -> Embeddings:
        """Returns the embeddings (N, E) of images of one shape."""

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Returns the words of the prompts that the model has not learned. It can take milliseconds."""

    def close(self) -> None:
        """Releases the resources of the model. A call that is in progress raises an error. Any thread may call this."""


class Reading(Protocol[T]):
    """Values that the device computes and copies to the host."""

    def is_ready(self) -> bool:
        """Returns True if `wait` returns immediately."""

    def wait(self) -> T:
        """Waits for the values. Raises DeviceLostError if the device fails."""


@dataclass(frozen=True, slots=True)
class Ready(Generic[T]):
    """Values that are already on the host."""

    values: T

    def is_ready(self) -> bool:
        """Returns True."""
        return True

    def wait(self) -> T:
        """Returns the values."""
        return self.values


class StepRunner(Protocol):
    """Computes steps and keeps the state of the rows.

    A runner may enqueue its work on a device and return before the device has done it. The device does the work in the
    order of the calls. So a reading has the values after all steps that were enqueued before it.

    A call that raises an error other than DeviceLostError has not changed any row, so that it can be repeated.
    """

    @property
    def models(self) -> dict[str, ModelInfo]:
        """Returns the served models by name. The first one is the default."""

    @property
    def clip(self) -> ClipEmbedder | None:
        """Returns the CLIP model, or None if none is loaded."""

    @property
    def device_memory(self) -> Callable[[], int] | None:
        """Returns a function that returns the number of bytes reserved on the GPU, or None without a GPU."""

    @property
    def network_seconds(self) -> float:
        """Returns the total number of seconds spent in network calls since the start."""

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """Runs one reverse step of each row. Returns the rows whose values are known to be not finite.

        `before_call` is called immediately before each network call. A runner that does not wait for the step returns
        no rows here. Its readings then have None instead of the values of these rows.
        """

    def pixels(self, trajectories: list[Trajectory]) -> Reading[Sequence[Pixels | None]]:
        """Reads the current prediction of x_0 of each row, as 8-bit pixels."""

    def pixels_with_x_t(self, trajectories: list[Trajectory]) -> Reading[Sequence[tuple[Pixels, Pixels] | None]]:
        """Reads the current prediction of x_0 and the current x_t of each row, as 8-bit pixels."""

    def errors(self, trajectories: list[Trajectory]) -> Reading[Sequence[Sequence[float] | None]]:
        """Reads the errors of the remaining classes in the last step, for rows that compare the classes."""

    def release(self, trajectories: list[Trajectory]) -> None:
        """Frees the state of these rows."""

    @property
    def max_rows(self) -> int | None:
        """Returns the largest number of rows of a step, or None without a limit."""

    @property
    def steps_ahead(self) -> int:
        """Returns the largest number of steps that `step` enqueues before it waits for the device.

        It is 0 if `step` waits until the device has finished the step.
        """

    @property
    def has_idle_work(self) -> bool:
        """Returns True if the runner has idle work: work that can wait until there are no rows."""

    def idle(self) -> None:
        """Does a part of the idle work. A part must be short, because new rows wait for it."""

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        """Checks each model, makes the first slow calls, and returns the measured step times.

        Returns early if `should_stop` returns True. Raises RunnerError if a model generates wrong images.
        """

    def check(self) -> None:
        """Tests each model: generates its probe image and compares it with the copy in the checkpoint.

        Raises RunnerError if an image differs. Other errors mean that the image could not be generated.
        """
