"""One image's path x_T -> x_0, and the job of which it is a part. No tensors: the runner keeps those."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model.sampler import Sampler

DEFAULT_MODEL, FAST_MODEL = "default", "fast"  # what draws where a request names none, and what draws in few steps
Pixels = npt.NDArray[np.uint8]  # (H, W) or (H, W, 3)
TARGET_SHARE = 0.9  # of the timeout: the scheduler aims to finish by then, so that steps may be a tenth slower


@dataclass(frozen=True, slots=True)
class Options:
    """What is drawn; with an index it decides every bit of an image."""

    digit: int
    seed: int
    num_steps: int
    sampler: Sampler
    guidance_scale: float
    model: str = DEFAULT_MODEL


@dataclass(eq=False, slots=True)
class Trajectory:
    """One image between x_T and x_0."""

    job: "Job"
    index: int
    step: int = 0  # reverse steps done
    started: bool = False  # it has had, or is having, its first step
    slot: int | None = None  # the runner's place for its state

    @property
    def steps_left(self) -> int:
        """Reverse steps until x_0."""
        return self.job.options.num_steps - self.step

    @property
    def evaluations(self) -> int:
        """Network evaluations of the next step: guidance takes a second one."""
        return 2 if self.step in self.job.guided_steps else 1

    @property
    def evaluations_left(self) -> int:
        """Network evaluations until x_0."""
        return self.job.evaluations_from(self.step)


@dataclass(frozen=True, slots=True)
class Progress:
    """A look at a running job: step `step` of `of`, the predicted x_0 of every image."""

    step: int
    of: int
    previews: list[Pixels]


@dataclass(frozen=True, slots=True)
class ImageDone:
    """One image is finished."""

    index: int
    pixels: Pixels


Listener = Callable[[Progress | ImageDone], None]  # called by the engine's thread; must not block


@dataclass(eq=False)
class Job:
    """A request's images, admitted whole, answered once through `future`. Times are of time.monotonic()."""

    options: Options
    count: int
    timeout: float = math.inf  # seconds from `submitted_at` until the request is answered with 504
    num_previews: int = 0
    listener: Listener | None = None
    guided_steps: range = range(0)  # the steps that take a second evaluation
    request_id: str = ""  # for the log
    future: "Future[list[Pixels]]" = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.monotonic)
    submitted_at_step: int = 0  # the engine's count of steps
    position: int = 0  # images that waited when the job was admitted
    eta_seconds: float = 0.0  # expected time to finish, when the job was admitted
    started_at: float | None = None
    finished_at: float | None = None

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # Only the engine may complete this future.
        self.unfinished = [Trajectory(self, index) for index in range(self.count)]  # the furthest along first
        self.pixels: list[Pixels | None] = [None] * self.count
        self.deadline = self.submitted_at + self.timeout
        self.target = self.submitted_at + TARGET_SHARE * self.timeout
        self.number = 0  # counts admitted jobs; decides between equal targets
        self.slot: int | None = None  # the backlog's place for the job's figures
        self.num_waiting = self.count  # images without a step
        self.evaluations_left = self.count * self.evaluations_from(0)  # of all images together
        self.steps_done = 0  # of all images together
        self.closed = False  # Answered. Read for each row at each step, where the future's lock would cost time.
        self._previews_sent = 0

    def evaluations_from(self, step: int) -> int:
        """Network evaluations of one image from `step` on: guided steps take two."""
        num_steps, guided = self.options.num_steps, self.guided_steps
        return num_steps - step + max(0, min(guided.stop, num_steps) - max(guided.start, step))

    def preview_due(self) -> bool:
        """Whether the images' mean step has passed the next of `num_previews` even marks; asking takes the mark."""
        marks = self.num_previews * self.steps_done // (self.count * self.options.num_steps)
        due = marks > self._previews_sent
        self._previews_sent = max(marks, self._previews_sent)
        return due

    def progress(self, previews: dict[int, Pixels]) -> Progress:
        """How far the job is; `previews` are those of its unfinished images, by index."""
        images = [previews.get(index, pixels) for index, pixels in enumerate(self.pixels)]
        step = self.steps_done // self.count
        return Progress(step, self.options.num_steps, [image for image in images if image is not None])

    def finish(self, trajectory: Trajectory, pixels: Pixels) -> None:
        """Takes one image; answers when it was the last."""
        self.unfinished.remove(trajectory)
        self.pixels[trajectory.index] = pixels
        self.tell(ImageDone(trajectory.index, pixels))
        if not self.unfinished:
            self.closed, self.finished_at = True, time.monotonic()
            self.future.set_result([image for image in self.pixels if image is not None])

    def fail(self, error: Exception) -> None:
        """Answers with an error; a job that was answered stays as it is."""
        if not self.closed:
            self.closed, self.finished_at = True, time.monotonic()
            self.future.set_exception(error)

    def tell(self, event: Progress | ImageDone) -> None:
        """Passes an event to whoever listens."""
        if self.listener:
            self.listener(event)
