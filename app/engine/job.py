"""Jobs: the images of a request between x_T and x_0. The runner keeps the tensors."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model.sampler import Sampler

DEFAULT_MODEL, FAST_MODEL = "default", "fast"  # the model of requests that name none, and the model for few steps
Pixels = npt.NDArray[np.uint8]  # (H, W) or (H, W, 3)
TARGET_SHARE = 0.9  # of the timeout; the scheduler aims to finish by then, so that steps may be a tenth slower


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a request that change pixels. Together with an index they decide every bit of an image."""

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
    started: bool = False  # its first step is done or in progress
    slot: int | None = None  # the runner's place for its state

    @property
    def steps_left(self) -> int:
        """Returns the number of reverse steps until x_0."""
        return self.job.request.options.num_steps - self.step

    @property
    def evaluations(self) -> int:
        """Returns the network evaluations of the next step: 2 with guidance, else 1."""
        return 2 if self.step in self.job.request.guided_steps else 1

    @property
    def evaluations_left(self) -> int:
        """Returns the number of network evaluations until x_0."""
        return self.job.request.evaluations_from(self.step)


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a running job: step `step` of `of`, and the predicted x_0 of every image."""

    step: int
    of: int
    previews: list[Pixels]


@dataclass(frozen=True, slots=True)
class ImageDone:
    """One image is finished."""

    index: int
    pixels: Pixels


Listener = Callable[[Progress | ImageDone], None]  # called by the engine's thread; must not block


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request as the engine receives it."""

    options: Options
    count: int
    timeout: float = math.inf  # seconds from the submission until the request is answered with 504
    num_previews: int = 0
    listener: Listener | None = None
    guided_steps: range = range(0)  # the steps that take a second evaluation
    request_id: str = ""  # for the log

    def evaluations_from(self, step: int) -> int:
        """Returns the network evaluations of one image from `step` on: guided steps take two."""
        num_steps, guided = self.options.num_steps, self.guided_steps
        return num_steps - step + max(0, min(guided.stop, num_steps) - max(guided.start, step))


@dataclass(slots=True)
class Timings:
    """The times at which a job reached each stage, in seconds of time.monotonic()."""

    submitted_at: float = field(default_factory=time.monotonic)
    submitted_at_step: int = 0  # the engine's count of steps
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate for a job at its admission."""

    position: int  # number of images that wait for their first step
    seconds: float  # until the last image is finished


class Job:
    """A request's images. They are admitted together and answered once, through `future`."""

    def __init__(self, request: JobRequest, submitted_at: float | None = None) -> None:
        """`submitted_at` is a time of time.monotonic(); by default, now."""
        self.request = request
        self.timings = Timings() if submitted_at is None else Timings(submitted_at)
        self.deadline = self.timings.submitted_at + request.timeout
        self.target = self.timings.submitted_at + TARGET_SHARE * request.timeout
        self.estimate: Estimate | None = None  # set by admission
        self.future: Future[list[Pixels]] = Future()
        self.future.set_running_or_notify_cancel()  # Only the engine may complete this future.
        self.unfinished = [Trajectory(self, index) for index in range(request.count)]  # by progress, largest first
        self.num_waiting = request.count  # images without a step
        self.evaluations_left = request.count * request.evaluations_from(0)  # of all images together
        self.steps_done = 0  # of all images together
        self.closed = False  # True once answered. Each step reads it for each row: the future's lock would be slow.
        self._pixels: list[Pixels | None] = [None] * request.count
        self._previews_sent = 0

    def preview_due(self) -> bool:
        """Returns True, once for each mark, if the images' mean step has passed one of `num_previews` even marks."""
        marks = self.request.num_previews * self.steps_done // (self.request.count * self.request.options.num_steps)
        due = marks > self._previews_sent
        self._previews_sent = max(marks, self._previews_sent)
        return due

    def progress(self, previews: dict[int, Pixels]) -> Progress:
        """Returns the progress of the job. `previews` are those of its unfinished images, by index."""
        images = [previews.get(index, pixels) for index, pixels in enumerate(self._pixels)]
        step = self.steps_done // self.request.count
        return Progress(step, self.request.options.num_steps, [image for image in images if image is not None])

    def finish(self, trajectory: Trajectory, pixels: Pixels) -> None:
        """Stores one finished image. Answers the job if it was the last one."""
        self.unfinished.remove(trajectory)
        self._pixels[trajectory.index] = pixels
        self.tell(ImageDone(trajectory.index, pixels))
        if not self.unfinished:
            self._close()
            self.future.set_result([image for image in self._pixels if image is not None])

    def fail(self, error: Exception) -> None:
        """Answers the job with an error, unless it was answered before."""
        if not self.closed:
            self._close()
            self.future.set_exception(error)

    def tell(self, event: Progress | ImageDone) -> None:
        """Passes an event to the listener, if there is one."""
        if self.request.listener:
            self.request.listener(event)

    def _close(self) -> None:
        self.closed, self.timings.finished_at = True, time.monotonic()
