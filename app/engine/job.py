"""Jobs and their images: the progress of a request from x_T to x_0. The tensors are in the runner.

A job has all images of one request. A trajectory is one of these images. In a step, it is a row of the batch.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model.sampler import Sampler

DEFAULT_MODEL, FAST_MODEL = "default", "fast"  # the model of requests without `model`, and the model for few steps
Pixels = npt.NDArray[np.uint8]  # (H, W) or (H, W, 3)
# The scheduler aims to finish a job after this share of its timeout. The rest is a reserve: a job still meets its
# deadline if steps take a tenth longer than predicted.
TARGET_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a request that change pixels. Together with the index they determine every bit of an image."""

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
    step: int = 0  # number of finished reverse steps
    started: bool = False  # True if the first step is finished or in progress
    slot: int | None = None  # slot of its state on the device; None before the first step and after release

    @property
    def steps_left(self) -> int:
        """Returns the number of reverse steps that are left until x_0."""
        return self.job.request.options.num_steps - self.step

    @property
    def evaluations(self) -> int:
        """Returns the number of network evaluations of the next step: 2 with guidance, otherwise 1."""
        return 2 if self.step in self.job.request.guided_steps else 1

    @property
    def evaluations_left(self) -> int:
        """Returns the number of network evaluations that are left until x_0."""
        return self.job.request.evaluations_from(self.step)


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a running job."""

    step: int  # mean number of finished steps of its images, rounded down
    of: int  # number of steps of an image
    previews: list[Pixels]  # the predicted x_0 of every image


@dataclass(frozen=True, slots=True)
class ImageDone:
    """The event that one image is finished."""

    index: int
    pixels: Pixels


Listener = Callable[[Progress | ImageDone], None]  # called in the engine thread; must not block


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request as the engine receives it."""

    options: Options
    count: int
    timeout: float = math.inf  # seconds from submission to deadline; an unfinished request is then answered with 504
    num_previews: int = 0  # number of Progress events to send
    listener: Listener | None = None
    guided_steps: range = range(0)  # the steps that need a second evaluation
    request_id: str = ""  # used in log lines

    def evaluations_from(self, step: int) -> int:
        """Returns the number of network evaluations of one image from `step` to x_0. A guided step has two."""
        num_steps, guided = self.options.num_steps, self.guided_steps
        return num_steps - step + max(0, min(guided.stop, num_steps) - max(guided.start, step))


@dataclass(slots=True)
class Timings:
    """The times at which a job reached each stage, in seconds of time.monotonic()."""

    submitted_at: float = field(default_factory=time.monotonic)
    submitted_at_step: int = 0  # number of steps that the engine had finished at this time
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate that a client receives when its job is admitted."""

    position: int  # number of images that wait for their first step and were admitted earlier
    seconds: float  # expected time until the last image of the job is finished


class Job:
    """The images of one request. They are admitted together, and the job is answered once, through `future`."""

    def __init__(self, request: JobRequest, submitted_at: float | None = None) -> None:
        """`submitted_at` is a value of time.monotonic(). The default is the current time."""
        self.request = request
        self.timings = Timings() if submitted_at is None else Timings(submitted_at)
        self.deadline = self.timings.submitted_at + request.timeout
        self.target = self.timings.submitted_at + TARGET_SHARE * request.timeout
        self.estimate: Estimate | None = None  # set by admission
        self.future: Future[list[Pixels]] = Future()
        self.future.set_running_or_notify_cancel()  # Only the engine may complete this future.
        # The images with the most finished steps come first.
        self.unfinished = [Trajectory(self, index) for index in range(request.count)]
        self.num_waiting = request.count  # images that have not started
        self.evaluations_left = request.count * request.evaluations_from(0)  # sum over all images
        self.steps_done = 0  # sum of the finished steps of all images
        # True if the job is answered. Every step checks this for every row. future.done() takes a lock and is slower.
        self.closed = False
        self._pixels: list[Pixels | None] = [None] * request.count
        self._previews_sent = 0

    def preview_due(self) -> bool:
        """Returns True if a Progress event must be sent now. A second call at the same progress returns False.

        Events are evenly spread over the steps of all images. Example: one image with 20 steps and 5 previews sends
        events after steps 4, 8, 12, 16 and 20.
        """
        marks = self.request.num_previews * self.steps_done // (self.request.count * self.request.options.num_steps)
        due = marks > self._previews_sent
        self._previews_sent = max(marks, self._previews_sent)
        return due

    def progress(self, previews: dict[int, Pixels]) -> Progress:
        """Returns the progress of the job. `previews` has the previews of its unfinished images by index."""
        images = [previews.get(index, pixels) for index, pixels in enumerate(self._pixels)]
        step = self.steps_done // self.request.count
        return Progress(step, self.request.options.num_steps, [image for image in images if image is not None])

    def finish(self, trajectory: Trajectory, pixels: Pixels) -> None:
        """Stores one finished image. Answers the job if this was its last unfinished image."""
        self.unfinished.remove(trajectory)
        self._pixels[trajectory.index] = pixels
        self.tell(ImageDone(trajectory.index, pixels))
        if not self.unfinished:
            self._close()
            self.future.set_result([image for image in self._pixels if image is not None])

    def fail(self, error: Exception) -> None:
        """Answers the job with an error. Does nothing if the job is already answered."""
        if not self.closed:
            self._close()
            self.future.set_exception(error)

    def tell(self, event: Progress | ImageDone) -> None:
        """Passes an event to the listener, if there is one."""
        if self.request.listener:
            self.request.listener(event)

    def _close(self) -> None:
        self.closed, self.timings.finished_at = True, time.monotonic()
