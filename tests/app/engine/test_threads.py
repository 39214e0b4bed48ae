"""Tests the engine with several threads that submit, cancel and stream jobs at the same time.

The interpreter switches between threads every 10 µs instead of every 5 ms, so that races appear within seconds.
"""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count

import pytest

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.backlog import Backlog
from app.engine.engine import Engine, EngineState
from app.engine.job import Frame, FrameRequest, ImageDone, Job, Progress, Trajectory
from app.engine.step_times import StepTimes
from tests.app.fakes import (
    WAIT_SECONDS,
    FakeRunner,
    backlog_of,
    images,
    new_engine,
    new_job,
    new_recognition,
    running,
    same,
)

NUM_THREADS = 4
SWITCH_SECONDS = 1e-5
CAPACITY = 128
MAX_OPEN = 16  # jobs of a client that are not answered


@pytest.fixture(autouse=True)
def short_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Client:
    """Submits random jobs, cancels some of them, and checks the answers of the others. It keeps MAX_OPEN jobs open."""

    def __init__(self, engine: Engine, number: int, num_jobs: int) -> None:
        self._engine, self._choose, self._num_jobs = engine, random.Random(number), num_jobs
        self._seeds = count(number * num_jobs)
        self._open: list[tuple[Job, list[Progress | ImageDone], list[Frame]]] = []
        self.num_answers = self.num_refused = self.num_cancelled = self.num_events = 0

    def run(self) -> None:
        for _ in range(self._num_jobs):
            self._submit()
            if len(self._open) >= MAX_OPEN:
                self._end(*self._open.pop(self._choose.randrange(MAX_OPEN)))
        for each in self._open:
            self._end(*each)

    def _submit(self) -> None:
        events: list[Progress | ImageDone] = []
        frames: list[Frame] = []
        if self._choose.random() < 0.2:
            job = new_recognition(5, next(self._seeds))
        else:
            num_steps = self._choose.choice([1, 3, 10])
            job = new_job(
                self._choose.choice([1, 1, 2, 5]),
                num_steps,
                next(self._seeds),
                num_previews=self._choose.choice([0, 3, 10]),
                listener=events.append,
                includes_x_t=self._choose.random() < 0.3,
                frames=FrameRequest(num_steps, frames.append) if self._choose.random() < 0.3 else None,
            )
        try:
            self._engine.submit(job)
        except errors.Overloaded:
            self.num_refused += 1
        else:
            self._open.append((job, events, frames))

    def _end(self, job: Job, events: list[Progress | ImageDone], frames: list[Frame]) -> None:
        if not job.closed and self._choose.random() < 0.9:
            self._engine.cancel(job, ClientGoneError())
            with suppress(ClientGoneError):
                job.future.result(WAIT_SECONDS)
            self.num_cancelled += 1
            return
        results = job.future.result(WAIT_SECONDS)
        if not job.request.comparison:
            assert same(results, images(job))  # type: ignore[arg-type]
            assert sum(isinstance(event, ImageDone) for event in events) == job.request.count
            num_frames = job.request.frames.num_frames - 1 if job.request.frames else 0
            assert len(frames) == job.request.count * num_frames
        self.num_events += len(events)
        self.num_answers += 1


def run_in_threads(*tasks: Callable[[], None]) -> None:
    """Runs each task in a thread of its own. Raises an error if a task raises one."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        for future in [threads.submit(task) for task in tasks]:
            future.result()


def new_fast_engine() -> Engine:
    return new_engine(FakeRunner(step_times=StepTimes({1: 1e-6, 1024: 1e-6})), capacity=CAPACITY, max_batch=8)


def serve_in_threads(num_jobs: int, engine: Engine) -> list[Client]:
    """Runs a client in each thread. Returns the clients after all jobs have ended."""
    with running(engine):
        engine.ready.result(WAIT_SECONDS)
        clients = [Client(engine, number, num_jobs) for number in range(NUM_THREADS)]
        run_in_threads(*(client.run for client in clients))
        assert engine.state is EngineState.OK
    return clients


def check_empty(backlog: Backlog) -> None:
    assert (backlog.jobs, backlog.waiting, backlog.running, backlog.work) == ([], 0, 0, 0)
    assert backlog.with_previews == {}


def check_clients(clients: list[Client], num_jobs: int) -> None:
    for client in clients:
        assert client.num_answers + client.num_cancelled + client.num_refused == num_jobs
    assert sum(client.num_answers for client in clients) >= num_jobs
    assert sum(client.num_events for client in clients) >= num_jobs


def test_threads_that_submit_cancel_and_stream_do_not_disturb_the_engine() -> None:
    engine = new_fast_engine()
    check_clients(serve_in_threads(500, engine), 500)
    check_empty(backlog_of(engine))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_50_000_jobs_of_four_threads_do_not_disturb_the_engine() -> None:
    engine = new_fast_engine()
    check_clients(serve_in_threads(12_500, engine), 12_500)
    check_empty(backlog_of(engine))


def test_step_of_a_row_is_right_while_another_thread_cancels_its_job() -> None:
    """A row leaves the clock of the batch. Its step must not change, even for a moment."""
    job = new_job(num_steps=100)
    (row,) = job.unfinished
    clocks = [type(row.clock)() for _ in range(2)]
    for clock, steps in zip(clocks, (70, 20), strict=True):
        clock.steps = steps
    row.step = 7
    is_over = threading.Event()

    def move(row: Trajectory) -> None:
        while not is_over.is_set():
            for clock in clocks:
                row.follow(clock)

    mover = threading.Thread(target=move, args=(row,))
    mover.start()
    found = {row.step for _ in range(300_000)}
    is_over.set()
    mover.join()
    assert found == {7}


def test_job_can_be_submitted_while_the_engine_looks_for_due_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that submits has to wait. Otherwise it would change the jobs through which the engine iterates."""
    engine, threads = new_engine(FakeRunner()), list[threading.Thread]()
    first, late = (new_job(num_previews=1, listener=lambda event: None) for _ in range(2))
    preview_due = Job.preview_due

    def submit_meanwhile(job: Job) -> bool:
        if not threads:
            threads.append(threading.Thread(target=engine.submit, args=(late,)))
            threads[0].start()
            threads[0].join(0.1)  # without the engine's lock, the job is added in this time
        return preview_due(job)

    monkeypatch.setattr(Job, "preview_due", submit_meanwhile)
    with running(engine):
        engine.ready.result(WAIT_SECONDS)
        engine.submit(first)
        for job in (first, late):
            assert same(job.future.result(WAIT_SECONDS), images(job))  # type: ignore[arg-type]
