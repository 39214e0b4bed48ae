"""Tests the engine with several threads that submit, cancel and stream jobs at the same time.

The interpreter switches between threads every 10 µs instead of every 5 ms, so that races appear within seconds.
"""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import pytest

from app import errors
from app.api.http.requests import ClientGoneError
from app.engine.engine import Engine, EngineState
from app.engine.job import Frame, FrameRequest, ImageDone, Job, Progress, Trajectory
from app.engine.step_times import StepTimes
from tests.app.fakes import WAIT_SECONDS, FakeRunner, images, new_engine, new_job, new_recognition, running, same

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


def serve_in_threads(num_jobs: int) -> list[Client]:
    """Runs a client in each thread. Returns the clients after all jobs have ended."""
    runner = FakeRunner(step_times=StepTimes({1: 1e-6, 1024: 1e-6}))
    with running(new_engine(runner, capacity=CAPACITY, max_batch=8)) as engine:
        engine.ready.result(WAIT_SECONDS)
        clients = [Client(engine, number, num_jobs) for number in range(NUM_THREADS)]
        failures: list[BaseException] = []

        def run(client: Client) -> None:
            try:
                client.run()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert engine.state is EngineState.OK
        backlog = engine.backlog
        assert (backlog.jobs, backlog.waiting, backlog.running, backlog.work) == ([], 0, 0, 0)
        assert backlog.with_previews == {}
    return clients


def check_clients(clients: list[Client], num_jobs: int) -> None:
    for client in clients:
        assert client.num_answers + client.num_cancelled + client.num_refused == num_jobs
    assert sum(client.num_answers for client in clients) >= num_jobs
    assert sum(client.num_events for client in clients) >= num_jobs


def test_threads_that_submit_cancel_and_stream_do_not_disturb_the_engine() -> None:
    check_clients(serve_in_threads(num_jobs=500), 500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_50_000_jobs_of_four_threads_do_not_disturb_the_engine() -> None:
    check_clients(serve_in_threads(num_jobs=12_500), 12_500)


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
