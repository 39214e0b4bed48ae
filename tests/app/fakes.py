"""A fake runner with predictable images, and engines that use it with or without their thread."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.engine.backlog import Backlog
from app.engine.batcher import StepLimits, select_rows
from app.engine.engine import Engine
from app.engine.interface import ClipEmbedder, ModelInfo, Reading, Ready, StepRunner
from app.engine.job import Job, JobRequest, Options, Pixels, Search, StepKind, StepRows, Trajectory
from app.engine.step_loop import StepLoop
from app.engine.step_times import StepTimes
from app.metrics import Metrics
from model.inpainting import ClassDistances
from model.recognition import CYCLE, MAX_NUM_PAIRS, Readout, Recognition, timesteps
from model.schedule import Schedule, ScheduleConfig
from model.spec import SAMPLERS, Evaluation, Guidance, TrainingFacts

# Distances count equally, and a class is dropped if its log-odds are more than 6 below the best class.
READOUT = Readout(
    weights_sha256="",
    weights=(1.0,) * len(CYCLE),
    offsets=((0.0,) * 10,) * MAX_NUM_PAIRS,
    half_at=1e9,
    margin=6.0,
    typical=((0.0, 0.0),) * len(CYCLE),
    suspicion=(0.0,) * len(CYCLE),
    bias=0.0,
    limit=1.0,
)
INFO = ModelInfo(
    name="default",
    sha256="0" * 64,
    num_parameters=0,
    device="cpu",
    dtype="float32",
    version="0",
    compiled=False,
    class_names=tuple("0123456789"),
    normalises_drawings=True,
    steps=(),
    samplers=("ddpm", "ddim", "dpmpp"),
    guidance=dict.fromkeys(SAMPLERS, Guidance(1.0, 51, 100)),
    guided_steps=lambda options: range(options.num_steps // 2),
    clip_steps=lambda options: range(options.num_steps // 2, options.num_steps),
    guidable=True,
    image_shape=(1, 28, 28),
    schedule=Schedule(ScheduleConfig()),
    readout=READOUT,
    training=TrainingFacts("default", "MNIST", 30, (Evaluation("ddpm", 100, 3.0, 10_000, 0.9978, 0.0544),)),
)
WAIT_SECONDS = 60  # time limit in seconds for another thread

Rows = list[Trajectory]


def image(seed: int, index: int, num_steps: int) -> Pixels:
    """Returns the image that FakeRunner generates. It encodes the seed, the index and the number of steps."""
    return np.array([[seed % 256, seed // 256 % 256, index % 256, num_steps]], dtype=np.uint8)


def images(job: Job) -> list[Pixels]:
    """Returns the expected images of a job."""
    return [image(job.request.options.seed, index, job.request.options.num_steps) for index in range(job.request.count)]


def same(left: list[Pixels], right: list[Pixels]) -> bool:
    """True if both lists contain the same images in the same order."""
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def new_job(
    count: int = 1, num_steps: int = 3, seed: int = 0, digit: int = 0, model: str = "default", **fields: Any
) -> Job:
    """Creates a job with defaults for the fields that a test does not need."""
    submitted_at = fields.pop("submitted_at", None)
    return Job(JobRequest(Options(digit, seed, num_steps, "ddpm", 1.0, model), count, **fields), submitted_at)


def new_recognition(num_pairs: int = 20, seed: int = 0, **fields: Any) -> Job:
    """Creates a job that recognises an image. With the fake runner, the result is the last digit of the seed."""
    options = Options(None, seed, num_pairs, "forward", 1.0, path=(*timesteps(num_pairs), 0))
    return Job(JobRequest(options, 1, comparison=Recognition(READOUT, 0.0, num_pairs), **fields))


def new_search(count: int = 1, num_steps: int = 3, seed: int = 0, search_steps: int = 2, **fields: Any) -> Job:
    """Creates a job that searches for the digit of its images. With the fake runner, it finds the seed's last digit."""
    submitted_at = fields.pop("submitted_at", None)
    of_search = Options(None, fields.pop("search_seed", seed), search_steps, "ddpm", 1.0)
    search = Search(of_search, ClassDistances(10, search_steps))
    return Job(JobRequest(Options(None, seed, num_steps, "ddpm", 1.0), count, search=search, **fields), submitted_at)


def new_recognised_search(count: int = 1, num_steps: int = 3, seed: int = 0, num_pairs: int = 20, **fields: Any) -> Job:
    """Creates a job that recognises its input before it generates images. It finds the last digit of the seed."""
    options = Options(None, seed, num_pairs, "forward", 1.0, path=(*timesteps(num_pairs), 0))
    search = Search(options, Recognition(READOUT, 0.0, num_pairs))
    return Job(JobRequest(Options(None, seed, num_steps, "ddpm", 1.0), count, search=search, **fields))


def recognised_class(job: Job) -> int:
    """Returns the class that a job recognises with the fake runner."""
    return job.request.options.seed % 10


def fixed_limits(max_rows: int) -> StepLimits:
    """Returns limits for steps of at most `max_rows` rows, as with UNFOG_MAX_BATCH=max_rows."""
    return StepLimits.of(
        StepTimes({1: 1e-6, 1024: 1e-6}), max_rows, StepKind(("default",), 2, has_clip=False), auto=False
    )


@dataclass
class FakeRunner:
    """Counts the steps of each row. The `on_*` functions are called first and can raise or block."""

    step_times: StepTimes = field(default_factory=lambda: StepTimes({1: 1e-6, 1024: 1e-6}))
    on_step: Callable[[Rows], None] = lambda rows: None
    on_pixels: Callable[[Rows], None] = lambda rows: None
    on_warm_up: Callable[[Callable[[], bool]], None] = lambda should_stop: None
    on_check: Callable[[], None] = lambda: None
    on_errors: Callable[[Rows], None] = lambda rows: None
    not_finite: Callable[[Trajectory], bool] = lambda row: False
    error_of: Callable[[Trajectory, int], float] = lambda row, label: 1.0 if label == recognised_class(row.job) else 9.0
    num_checks: int = 0
    calls: list[Rows] = field(default_factory=list)  # the rows of each successful step
    held: Counter[Trajectory] = field(default_factory=Counter)  # number of steps of each row that has started
    models: dict[str, ModelInfo] = field(default_factory=lambda: {"default": INFO})
    clip: ClipEmbedder | None = None
    device_memory: Callable[[], int] | None = None
    network_seconds: float = 0.0
    has_idle_work: bool = False
    steps_ahead: int = 0
    max_rows: int | None = None

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> Rows:
        trajectories = rows.trajectories
        assert [row.step for row in trajectories] == rows.steps.tolist()
        assert [row.evaluations for row in trajectories] == rows.sizes.tolist()
        before_call()
        self.on_step(trajectories)
        self.calls.append(list(trajectories))
        self.network_seconds += 0.25
        assert len(set(trajectories)) == len(trajectories), "a step contains a row twice"
        self.held.update(trajectories)
        return [trajectory for trajectory in trajectories if self.not_finite(trajectory)]

    def pixels(self, trajectories: Rows) -> Reading[Sequence[Pixels | None]]:
        self.on_pixels(trajectories)
        return self.read([image(*t.noise_key, self.held[t]) for t in trajectories])

    def pixels_with_x_t(self, trajectories: Rows) -> Reading[Sequence[tuple[Pixels, Pixels] | None]]:
        self.on_pixels(trajectories)
        x_0 = [image(*t.noise_key, self.held[t]) for t in trajectories]
        return self.read([(each, 255 - each) for each in x_0])

    def errors(self, trajectories: Rows) -> Reading[Sequence[Sequence[float] | None]]:
        self.on_errors(trajectories)
        return self.read([[self.error_of(t, label) for label in _compared(t)] for t in trajectories])

    def read(self, values: list[Any]) -> Reading[list[Any]]:
        return Ready(values)

    def release(self, trajectories: Rows) -> None:
        for trajectory in trajectories:
            self.held.pop(trajectory, None)

    def idle(self) -> None:
        raise AssertionError("the engine calls this only if there is work that can wait")

    def check(self) -> None:
        self.num_checks += 1
        self.on_check()

    def warm_up(self, should_stop: Callable[[], bool]) -> StepTimes:
        self.on_warm_up(should_stop)
        return self.step_times


def _compared(trajectory: Trajectory) -> Sequence[int]:
    """Returns the classes of the evaluations of a step."""
    return trajectory.comparison.remaining if trajectory.comparison else []


class Gate:
    """An `on_step` function that blocks until `released` is set."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self, rows: Rows) -> None:
        self.entered.set()
        assert self.released.wait(WAIT_SECONDS)


class EngineWithLoop(Engine):
    """An engine and the loop that runs its steps. The loop has not started."""

    def __init__(self, runner: StepRunner, **options: Any) -> None:
        defaults: dict[str, Any] = {"capacity": 1024, "max_batch": 64, "watchdog_seconds": 1000.0, "metrics": Metrics()}
        super().__init__(**defaults | options)
        self.loop = StepLoop(self, lambda: runner, self._metrics)


def new_engine(runner: StepRunner, **options: Any) -> EngineWithLoop:
    """Creates an engine without starting its loop."""
    return EngineWithLoop(runner, **options)


def opened(engine: EngineWithLoop) -> EngineWithLoop:
    """Puts the engine into the state after warm-up, without starting its thread. `tick` then runs it."""
    engine.open(engine.loop._runner, engine.loop._runner.warm_up(lambda: False))
    return engine


def backlog_of(engine: Engine) -> Backlog:
    """Returns the backlog of the interactive jobs of an engine. No other thread may use the engine meanwhile."""
    return engine._backlog


def tick(engine: EngineWithLoop) -> None:
    """Runs one iteration of the engine's loop, unless its thread would wait for work."""
    if backlog_of(engine).jobs or engine._background.jobs or engine._abandoned:
        engine.loop._tick()


@contextmanager
def running(engine: EngineWithLoop) -> Iterator[EngineWithLoop]:
    """Runs the engine with its thread within the block."""
    engine.loop.start()
    try:
        yield engine
    finally:
        assert engine.loop.stop(WAIT_SECONDS)


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Waits until the condition is true. Another thread must make it true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def step_backlog(backlog: Backlog, max_rows: int) -> Rows:
    """Runs one step of the rows that the batcher selects, without an engine."""
    rows = select_rows(backlog.jobs, fixed_limits(max_rows), at_risk=False)
    backlog.replace_batch(rows)
    backlog.start_batch()
    ended = backlog.advance()
    backlog.finish([(row, image(row.job.request.options.seed, row.index, row.step)) for row in ended])
    return rows
