"""Jobs and their images: the progress of a request through the steps of its path. The tensors are in the runner.

A job has all images of one request. A trajectory is one of these images. In a step, it is a row of the batch. The tasks
differ in the image from which their trajectories start, in their path and in the pixels that are known (see
docs/tasks.md). If all pixels are known, each step compares the predictions of the classes with the image.

If the class of an image is unknown, a job can first search for it. The search is one trajectory that compares the
classes: each step takes one evaluation for each remaining class. Classes with much larger errors are dropped.

These terms are used in app/engine and app/runner:

    path         the timesteps that a trajectory visits (see plan_through in model/sampler.py)
    plan         the coefficients of all steps along a path (see Plan in model/sampler.py)
    evaluation   one evaluation of the network for one row and one label; a guided row takes two in a step
    slot         the place of a row's state in the tensors of the runner (see Slots in app/runner/device_state.py)
    finite       a row is finite while its values are neither NaN nor infinite
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.comparison import Comparison
from model.spec import Noise, Process

DEFAULT_MODEL, FAST_MODEL = "default", "fast"  # the names of the shipped models; `fast` needs few steps
IntArray = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]  # (H, W) or (H, W, 3)
StepSet = range | frozenset[int]
GUIDED_EVALUATIONS = 2  # a guided step evaluates the network with and without the class
# The scheduler aims to finish a job after this share of its timeout. The rest is a margin: a job still meets its
# deadline if steps take a tenth longer than predicted.
TARGET_SHARE = 0.9
SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 30.0, 600.0  # limits of the default timeout, in seconds (see admission.py)
MOST_SMALL_CLASSES = 100  # the largest number of classes that a small job compares
RESERVE_SHARE = 0.1  # share of the time of all steps that is kept for small jobs (see reserve.py)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a request that change pixels. Together with the index they determine every bit of an image."""

    label: int | None  # the number of the class; None: no class is assumed
    seed: int
    num_steps: int  # number of steps of the path
    sampler: Process
    guidance_scale: float
    model: str = DEFAULT_MODEL
    path: tuple[int, ...] = ()  # timesteps (see model/sampler.py); empty: the sampler's timesteps from T to 0
    clip_guidance_scale: float = 0.0  # 0: no CLIP guidance
    clip_prompt: str = ""  # empty without CLIP guidance
    noise: Noise = "unfog"


@dataclass(frozen=True, slots=True)
class ImageKey:
    """The values that distinguish an image from the other images of its request."""

    label: int
    seed: int
    index: int  # the noise depends on the seed and the index


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """The image from which trajectories start: x_t = signal * image + noise * z."""

    image: npt.NDArray[np.float32]  # (C, H, W); [-1, 1] is the range of pixels
    signal: float
    noise: float
    is_known: npt.NDArray[np.bool_] | None = None  # (C, H, W): pixels of the result that are given; None: no pixel


@dataclass(frozen=True, slots=True, eq=False)
class ClipTarget:
    """The CLIP guidance of a job: its scale, the embedding of its prompt, and its steps."""

    scale: float
    text: npt.NDArray[np.float32]  # (E,) embedding of the prompt
    steps: StepSet
    evaluations: int  # network evaluations that take as long as the gradient of CLIP for one row


Result = Pixels | Comparison  # the result of one trajectory


@dataclass(frozen=True, slots=True)
class Search:
    """The search for the class of a job. It runs before the images of the job are generated."""

    options: Options  # of the search; it assumes no class and has no guidance
    comparison: Comparison
    input: Input | None = None  # None: the input of the images


class Clock:
    """Counts the steps of a batch."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0


STOPPED = Clock()  # of the rows that are in no batch


@dataclass(eq=False, slots=True)
class Trajectory:
    """One image between x_T and x_0, or the search for the class of the images.

    A row in a batch follows a clock, which counts the steps of all rows of the batch at once.
    """

    job: "Job"
    index: int  # position among the images of the job
    comparison: Comparison | None = None  # None for a trajectory that generates an image
    started: bool = False  # True if the first step is finished or in progress
    slots: tuple[int, ...] = ()  # slots of its state; empty before the first step and after the release
    first_slot: int = -1  # the first one of `slots`, -1 without slots
    first_plan_row: int = -1  # the row of its first step in the runner's table of plans
    # The clock and its value before the first step. They are one value, because the thread that cancels a job changes
    # them while the engine thread reads `step`.
    _since: tuple[Clock, int] = (STOPPED, 0)

    @property
    def clock(self) -> Clock:
        """Returns the clock of the batch that the row is in, or STOPPED."""
        return self._since[0]

    @property
    def step(self) -> int:
        """Returns the number of finished reverse steps."""
        clock, first = self._since
        return clock.steps - first

    @step.setter
    def step(self, step: int) -> None:
        self._since = self.clock, self.clock.steps - step

    def follow(self, clock: Clock) -> None:
        """Adds the further steps of the clock to the steps of this row. STOPPED has none."""
        self._since = clock, clock.steps - self.step

    @property
    def is_search(self) -> bool:
        """Returns True for the search for the class."""
        search = self.job.request.search
        return search is not None and self.comparison is search.comparison

    @property
    def label(self) -> int | None:
        """Returns the class of this image, or None if no class is assumed."""
        images = self.job.request.images
        return images[self.index].label if images else self.job.label

    @property
    def noise_key(self) -> tuple[int, int]:
        """Returns the seed and the index on which the noise of this row depends."""
        images = self.job.request.images
        if images:
            return images[self.index].seed, images[self.index].index
        return self.options.seed, self.index

    @property
    def options(self) -> Options:
        """Returns the options of this row."""
        search = self.job.request.search
        return search.options if search and self.is_search else self.job.request.options

    @property
    def input(self) -> Input | None:
        """Returns the image from which this row starts, or None if it starts from noise."""
        search = self.job.request.search
        return search.input if search and self.is_search and search.input else self.job.request.input

    @property
    def num_slots(self) -> int:
        """Returns the number of slots that this trajectory needs: one for each x_t."""
        return self.comparison.num_classes if self.comparison and self.comparison.has_own_images else 1

    @property
    def steps_left(self) -> int:
        """Returns the largest number of steps that are left. A comparison can end earlier."""
        if self.comparison and not self.comparison.remaining:
            return 0
        return self.options.num_steps - self.step

    @property
    def network_evaluations(self) -> int:
        """Returns the number of network evaluations of the next step.

        This is the number of remaining classes in a comparison, and otherwise 2 with guidance and 1 without.
        """
        if self.comparison:
            return len(self.comparison.remaining)
        return GUIDED_EVALUATIONS if self.step in self.job.request.guided_steps else 1

    @property
    def clip(self) -> ClipTarget | None:
        """Returns the CLIP guidance of the next step, or None if it has none."""
        clip = self.job.request.clip
        return clip if clip and self.step in clip.steps else None

    @property
    def evaluations(self) -> int:
        """Returns the size of the next step for the scheduler, or 0 if no step is left.

        The size is the number of network evaluations. With CLIP guidance, the evaluations that take as long as the
        gradient of CLIP are added.
        """
        if self.comparison:
            return len(self.comparison.remaining)
        return self.job.sizes.of[self.step]

    @property
    def evaluations_left(self) -> int:
        """Returns the largest possible total size of the remaining steps."""
        if self.comparison:
            return self.steps_left * len(self.comparison.remaining)
        return self.job.sizes.left[self.step]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, with arrays for runners that handle many rows at once."""

    trajectories: list[Trajectory]  # the same list in each step until it changes
    steps: IntArray  # (B,) number of finished steps
    # (B,) size of the step of each row, in evaluations. As long as this is the same array object, the rows and their
    # sizes are the same, and `steps` increases by the same number for all rows.
    sizes: IntArray

    @classmethod
    def of(cls, trajectories: list[Trajectory]) -> "StepRows":
        """Returns these rows with their arrays."""
        steps, sizes = ([getattr(row, name) for row in trajectories] for name in ("step", "evaluations"))
        return cls(trajectories, np.array(steps, dtype=np.int64), np.array(sizes, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a running job."""

    step: int  # mean number of finished steps of its images, rounded down
    of: int  # number of steps of an image
    previews: list[Pixels]  # the predicted x_0 of every image
    x_t: list[Pixels] | None = None  # x_t of every image; None unless the request includes it


@dataclass(frozen=True, slots=True)
class ImageDone:
    """The event that one image is finished."""

    index: int
    pixels: Pixels


Listener = Callable[[Progress | ImageDone], None]  # called in the engine thread; must not block


@dataclass(frozen=True, slots=True)
class Frame:
    """x_t of one image, as a frame of an animation."""

    index: int
    number: int  # position among the frames of the image, from 0
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class FrameRequest:
    """A request for frames that show how each image emerges from noise.

    The frames of an image follow fixed numbers of its own steps. Unlike Progress events, they do not depend on how far
    the other images of the job are, and so not on the load.
    """

    num_frames: int  # of each image; at most its number of steps. The last frame, the finished image, is not sent.
    listener: Callable[[Frame], None]  # called in the engine thread; must not block


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request as the engine receives it."""

    options: Options
    count: int
    _: KW_ONLY
    # Seconds from submission to deadline; an unfinished request is then answered with 504. None: the engine chooses.
    timeout: float | None = math.inf
    # True if the job has no deadline and only takes steps while there are no other jobs (see background.py)
    is_background: bool = False
    num_previews: int = 0  # number of Progress events to send
    listener: Listener | None = None
    guided_steps: StepSet = range(0)  # the steps that need a second evaluation
    request_id: str = ""  # used in log lines
    input: Input | None = None  # None: the images start from noise
    comparison: Comparison | None = None  # if given, it is the result, and no image is generated
    search: Search | None = None  # if given, the job searches for the class before it generates the images
    includes_x_t: bool = False  # True if Progress events have x_t
    # If given, the label, the seed and the index of each image. Otherwise all images have the label and the seed of
    # `options`, and their position as index.
    images: tuple[ImageKey, ...] = ()
    clip: ClipTarget | None = None  # None: no CLIP guidance
    frames: FrameRequest | None = None  # None: no frames

    @property
    def widest_row(self) -> int:
        """Returns the largest size of one image in a step, in units of `Trajectory.evaluations`."""
        for comparison in (self.comparison, self.search and self.search.comparison):
            if comparison:
                return comparison.num_classes
        return (GUIDED_EVALUATIONS if self.guided_steps else 1) + (self.clip.evaluations if self.clip else 0)

    @property
    def network_evaluations(self) -> int:
        """Returns the largest number of network evaluations of one image."""
        if self.comparison:
            return self.options.num_steps * self.comparison.num_classes
        return _sizes_of(self.options.num_steps, self.guided_steps, range(0), 0).left[0]

    @property
    def sizes(self) -> "Sizes":
        """Returns the sizes of the steps of one image that compares no classes."""
        clip_steps, of_clip = (self.clip.steps, self.clip.evaluations) if self.clip else (range(0), 0)
        return _sizes_of(self.options.num_steps, self.guided_steps, clip_steps, of_clip)

    def evaluations_from(self, step: int) -> int:
        """Returns the largest total size of one image from `step` to its end, in units of `Trajectory.evaluations`."""
        if self.comparison:
            return (self.options.num_steps - step) * self.comparison.num_classes
        return self.sizes.left[step]


class StepKind(NamedTuple):
    """The properties of the steps of some jobs that determine the duration of a full step."""

    models: tuple[str, ...]  # in alphabetical order; each model needs its own network call
    widest_row: int  # the largest size of one row, in evaluations
    has_clip: bool  # True if a step can call CLIP


class Sizes(NamedTuple):
    """The sizes of the steps of an image, in evaluations. Each list has one more value than the image has steps."""

    of: list[int]  # the size of each step, and 0 after the last step
    left: list[int]  # the sum of the sizes from each step to the end
    until_change: list[int]  # the number of steps until the size changes, or until the end


@dataclass(slots=True)
class Timings:
    """The times at which a request reached each stage, in seconds of time.monotonic()."""

    submitted_at: float = field(default_factory=time.monotonic)
    submitted_at_step: int = 0  # number of steps that the engine had finished at this time
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def phases(self) -> tuple[float, float]:
        """The seconds that a finished request waited in the queue, and that its work took."""
        started, finished = self.started_at or self.submitted_at, self.finished_at or self.submitted_at
        return started - self.submitted_at, finished - started


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
        self.set_timeout(math.inf if request.timeout is None else request.timeout)
        self.estimate: Estimate | None = None  # set by admission
        self.place = -1  # place in the table of the backlog; -1 if the job is not in the backlog
        self.number = 0  # position in the order of admission of all jobs, from 1; set by the backlog
        # One image, or a recognition. A comparison of very many classes takes as long as many images.
        compared = request.comparison or (request.search and request.search.comparison)
        self.is_small = request.count == 1 and (not compared or compared.num_classes <= MOST_SMALL_CLASSES)
        self.is_reserved = False  # True if it was admitted as a reserved job (see reserve.py); set by the backlog
        self.future: Future[list[Result]] = Future()
        self.future.set_running_or_notify_cancel()  # Only the engine may complete this future.
        self.label = request.options.label  # the class of the images; set at the end of a search
        self.is_searching = request.search is not None  # True until the class is found, if the job searches for it
        self.sizes, self.widest_row = request.sizes, request.widest_row
        self.image_work = request.evaluations_from(0)  # the largest total size of one image
        # The rows with the most finished steps come first.
        self.unfinished = [Trajectory(self, 0, request.search.comparison)] if request.search else self._image_rows()
        self.num_waiting = request.count  # images that have not started
        # The first rows whose last step is finished or in progress. Their results are not stored yet.
        self.num_pending = 0
        # True if the job is answered. It is checked often. future.done() takes a lock and is slower.
        self.closed = False
        self._results: list[Result | None] = [None] * request.count
        self._previews_sent = 0
        self._frames_read: dict[int, int] = {}  # index of an image -> number of its frames that were read; missing: 0

    def set_timeout(self, seconds: float) -> None:
        """Sets the time from submission to deadline. A job in the backlog must keep it."""
        self.timeout = seconds
        self.deadline = self.timings.submitted_at + seconds
        self.target = self.timings.submitted_at + TARGET_SHARE * seconds

    @property
    def num_running(self) -> int:
        """Returns the number of unfinished images that have started. During a search no image has started."""
        return 0 if self.is_searching else len(self.unfinished) - self.num_waiting

    @property
    def extra_slots(self) -> int:
        """Returns the number of slots that the search needs in addition to one for each image. It is 0 afterwards."""
        return max(self.unfinished[0].num_slots - self.request.count, 0) if self.is_searching else 0

    @property
    def tail(self) -> tuple[int, int]:
        """Returns the evaluations and steps that are left of the tail: the image with the most steps left.

        During a search the tail is the search, followed by one image.
        """
        last, request = self.unfinished[-1], self.request
        if self.is_searching:
            return last.evaluations_left + self.image_work, last.steps_left + request.options.num_steps
        return last.evaluations_left, last.steps_left

    @property
    def evaluations_left(self) -> int:
        """Returns the largest possible total size of the remaining steps of both stages."""
        of_image = self.image_work
        if self.is_searching:
            return self.unfinished[0].evaluations_left + self.request.count * of_image
        if self.num_waiting == self.request.count:
            return self.num_waiting * of_image
        return sum(row.evaluations_left for row in self.unfinished)

    @property
    def steps_done(self) -> int:
        """Returns the sum of the finished steps of all images."""
        if self.is_searching:
            return 0
        num_finished = self.request.count - len(self.unfinished)
        return num_finished * self.request.options.num_steps + sum(row.step for row in self.unfinished)

    def preview_due(self) -> bool:
        """Returns True if a Progress event must be sent now. A second call at the same progress returns False.

        Events are evenly spread over the steps of all images. Example: one image with 20 steps and 5 previews sends
        events after steps 4, 8, 12, 16 and 20.
        """
        marks = self.request.num_previews * self.steps_done // (self.request.count * self.request.options.num_steps)
        due = marks > self._previews_sent
        self._previews_sent = max(marks, self._previews_sent)
        return due

    def frames_due(self) -> list[tuple[Trajectory, int]]:
        """Returns each image that has a frame to be read now, and the number of this frame.

        A second call at the same progress returns none. Example: with 20 steps and 5 frames, an image has frames after
        steps 4, 8, 12 and 16. The fifth frame is the finished image.
        """
        frames, num_steps = self.request.frames, self.request.options.num_steps
        if frames is None or self.is_searching:
            return []
        due = []
        for row in self.unfinished:
            num_frames = frames.num_frames * row.step // num_steps
            if self._frames_read.get(row.index, 0) < num_frames < frames.num_frames:
                self._frames_read[row.index] = num_frames
                due.append((row, num_frames - 1))
        return due

    def images_started(self) -> list[bool]:
        """Returns for each unfinished image whether it has started. During a search no image has started."""
        if self.is_searching:
            return [False] * self.request.count
        return [trajectory.started for trajectory in self.unfinished]

    def progress(self, step: int, previews: dict[int, Pixels], x_t: dict[int, Pixels] | None = None) -> Progress:
        """Returns the progress of the job after `step` steps.

        `previews` and `x_t` have the pixels of its unfinished images by index.
        """
        every_x_t = None if x_t is None else self._with_finished(x_t)
        return Progress(step, self.request.options.num_steps, self._with_finished(previews), every_x_t)

    def finish(self, trajectory: Trajectory, result: Result) -> None:
        """Stores the result of one row. Answers the job if this was its last image.

        After a search, the job begins its images with the class that was found.
        """
        if trajectory.is_search and trajectory.comparison:
            self.label, self.is_searching, self.unfinished = trajectory.comparison.label, False, self._image_rows()
            return
        self.unfinished.remove(trajectory)
        self._results[trajectory.index] = result
        if isinstance(result, np.ndarray):
            self.tell(ImageDone(trajectory.index, result))
        if not self.unfinished:
            self._close()
            self.future.set_result([result for result in self._results if result is not None])

    def fail(self, error: Exception) -> None:
        """Answers the job with an error. Does nothing if the job is already answered."""
        if not self.closed:
            self._close()
            self.future.set_exception(error)

    def tell(self, event: Progress | ImageDone) -> None:
        """Passes an event to the listener, if there is one."""
        if self.request.listener:
            self.request.listener(event)

    def _with_finished(self, pixels: dict[int, Pixels]) -> list[Pixels]:
        """Returns the pixels of unfinished images, by index, together with the finished images, in order."""
        images = [pixels.get(index, result) for index, result in enumerate(self._results)]
        return [image for image in images if isinstance(image, np.ndarray)]

    def _image_rows(self) -> list[Trajectory]:
        return [Trajectory(self, index, self.request.comparison) for index in range(self.request.count)]

    def _close(self) -> None:
        self.closed, self.timings.finished_at = True, time.monotonic()


@lru_cache(maxsize=4096)
def _sizes_of(num_steps: int, guided_steps: StepSet, clip_steps: StepSet, of_clip: int) -> Sizes:
    """Returns the sizes of the steps. A guided step has two evaluations, and CLIP guidance adds `of_clip`."""
    sizes = [
        (GUIDED_EVALUATIONS if step in guided_steps else 1) + (of_clip if step in clip_steps else 0)
        for step in range(num_steps)
    ]
    left, until_change = [0], [0]
    for size, next_size in zip(reversed(sizes), [0, *reversed(sizes)], strict=False):
        left.append(left[-1] + size)
        until_change.append(until_change[-1] + 1 if size == next_size else 1)
    return Sizes([*sizes, 0], left[::-1], until_change[::-1])
