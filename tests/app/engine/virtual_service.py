"""Simulates the scheduler on a virtual clock.

Clients send requests in closed loops. A step takes the predicted time multiplied by random noise.
"""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app import errors
from app.engine.admission import Admission
from app.engine.job import ClipTarget, Job, JobRequest, Options, Search, Trajectory
from app.engine.step_times import StepTimes
from model.inpainting import ClassDistances
from model.recognition import Recognition, timesteps
from model.spec import CALL_ROWS
from tests.app.fakes import READOUT, image

# The measured seconds of a step by its number of evaluations: the shipped network on two cores of a Zen 5, and on two
# cores of a Xeon with AMX.
MEASURED = {1: 1.0e-3, 2: 1.4e-3, 4: 2.1e-3, 8: 3.6e-3, 16: 7.0e-3, 32: 14.4e-3, 64: 29.0e-3}
MEASURED_WITH_AMX = {1: 2.0e-3, 2: 2.25e-3, 4: 2.8e-3, 8: 4.2e-3, 16: 6.9e-3, 32: 11.2e-3, 64: 21.3e-3}
TASKS = ("generate", "generate", "recognise", "edit", "inpaint")  # of the clients in a random mix


@dataclass
class Client:
    """Sends equal requests one after the other. After a refusal it waits for the time in Retry-After."""

    name: str
    count: int = 1
    num_steps: int = 100
    guided: bool = True
    model: str = "default"
    timeout: float = 30.0
    start: float = 0.0
    think: float = 0.001  # seconds between an answer and the next request
    repeats: bool = True  # False if it sends only one request
    task: str = "generate"
    clip_evaluations: int = 0  # if not 0: images have CLIP guidance, with this size in evaluations

    def job(self, now: float) -> Job:
        if self.task != "generate":
            return self._job_with_input(now)
        guided_steps = range(round(0.27 * self.num_steps), round(0.73 * self.num_steps)) if self.guided else range(0)
        options, clip = Options(0, 0, self.num_steps, "ddpm", 1.0, self.model), None
        if self.clip_evaluations:
            steps = range(round(0.4 * self.num_steps), round(0.95 * self.num_steps))
            clip = ClipTarget(1.0, np.zeros(1, np.float32), steps, self.clip_evaluations)
        return Job(JobRequest(options, self.count, timeout=self.timeout, guided_steps=guided_steps, clip=clip), now)

    def _job_with_input(self, now: float) -> Job:
        """Returns a job that recognises, or that searches for its class and then generates guided images."""
        compare = Options(None, 0, 20, "forward", 1.0, self.model, path=(*timesteps(20), 0))
        if self.task == "recognise":
            return Job(JobRequest(compare, 1, timeout=self.timeout, comparison=Recognition(READOUT, 0.0)), now)
        search = Search(replace(compare, sampler="ddpm", num_steps=17), ClassDistances(10, 17))
        if self.task == "edit":
            search = Search(compare, Recognition(READOUT, 0.0))
        options = Options(None, 0, self.num_steps, "ddpm", 2.0, self.model)
        guided_steps = range(self.num_steps // 4, self.num_steps // 2)
        return Job(JobRequest(options, self.count, timeout=self.timeout, guided_steps=guided_steps, search=search), now)


@dataclass
class Result:
    """The results of all requests."""

    # latencies of the finished requests in seconds, by client name
    latencies: dict[str, list[float]] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by client name and status
    late: list[Job] = field(default_factory=list)  # jobs that missed their deadlines against admission's prediction
    num_images: int = 0
    num_steps: int = 0
    seconds: float = 0.0

    def of(self, name: str) -> dict[str, int]:
        return {outcome: n for (client, outcome), n in self.outcomes.items() if client == name}


class VirtualService:
    """Calls admission and row selection in the same way as the engine."""

    def __init__(
        self,
        max_batch: int | None = None,
        capacity: int = 1024,
        measured: dict[int, float] = MEASURED,
        noise: Callable[[], float] = lambda: 1.0,
        clip_seconds: float = 0.0,
        slowness: Callable[[float], float] = lambda now: 1.0,  # duration of steps at a time, in multiples of `measured`
        of_models: Mapping[str, dict[int, float]] | None = None,  # the times of models that differ from `measured`
    ) -> None:
        self.slowness = slowness
        self.admission = Admission(capacity, max_batch)
        self.admission.open(StepTimes(measured, clip_seconds, of_models))
        self.actual_times, self.noise = StepTimes(measured, clip_seconds, of_models), noise
        self.now = 0.0
        self.predicted_late: set[Job] = set()  # jobs that were admitted only because the engine was idle
        self.steps: list[list[Trajectory]] = []
        self.work: list[tuple[float, int, int]] = []  # of each step: time, evaluations, and those of small jobs
        self.refused: list[Job] = []
        self.similar: dict[Job, bool] = {}  # True for jobs whose classes all have the same errors

    def submit(self, job: Job) -> None:
        if not self.admission.backlog.jobs:
            bound = self.admission.backlog.latest_finish_seconds(
                job, self.admission._full(self.admission.backlog.step_kind(job))
            )
            if self.now + bound > job.target:
                self.predicted_late.add(job)
        self.admission.admit(job, self.now)

    def step(self) -> list[Job]:
        """Runs one step. Returns the jobs that it finished."""
        rows = self.admission.select(self.now)
        assert rows
        backlog = self.admission.selected
        self.steps.append(rows)
        self.work.append((self.now, backlog.batch.size, sum(row.evaluations for row in rows if row.job.is_small)))
        calls, with_clip = Counter[str](), Counter[str]()
        for row in rows:
            calls[row.job.request.options.model] += row.network_evaluations
            with_clip[row.job.request.options.model] += row.clip is not None
        backlog.start_batch()
        clip_calls = sum(math.ceil(count / CALL_ROWS) for count in with_clip.values())
        seconds = sum(self.actual_times.of(model).seconds(count) for model, count in calls.items())
        seconds = (seconds + clip_calls * self.actual_times.clip_seconds) * self.noise() * self.slowness(self.now)
        predicted = backlog.calls()
        self.wait(seconds)
        self.admission.observe(predicted, seconds)
        ended = backlog.advance()
        for row in ended:
            if row.comparison:
                backlog.add_errors(row, self._errors(row))
        done = [row for row in ended if not row.steps_left]
        backlog.finish([(row, image(0, row.index, row.step)) for row in done])
        return [job for job in dict.fromkeys(row.job for row in done) if not job.unfinished]

    def wait(self, seconds: float) -> None:
        """Waits for the end of a step."""
        self.now += seconds

    def idle(self) -> None:
        """Waits for the next arrival."""
        self.now = max(self.now, self.arrivals[0][0])

    def alone_seconds(self, client: Client) -> float:
        """Returns the time of a request of this client on an idle machine at the measured speed."""
        job, seconds = client.job(0.0), 0.0
        (row,) = job.unfinished
        while row.steps_left:
            seconds += self.actual_times.of(client.model).seconds(row.network_evaluations)
            row.step += 1
        return seconds

    def _errors(self, row: Trajectory) -> list[float]:
        """Returns errors with which no class is dropped in half of the jobs, and most classes early in the others."""
        assert row.comparison
        has_similar_classes = self.similar.setdefault(row.job, len(self.similar) % 2 == 0)
        return [1.0 if has_similar_classes or label == 0 else 9.0 for label in row.comparison.remaining]

    def run(self, clients: Sequence[Client], until: float) -> Result:
        """Serves the clients until this time. Requests that miss their deadlines are answered with 504."""
        self.result, self.clients, self.owner = Result(), clients, dict[Job, int]()
        self.arrivals = [(client.start, i) for i, client in enumerate(clients)]
        heapq.heapify(self.arrivals)
        backlog = self.admission.backlog
        while self.now < until:
            while self.arrivals and self.arrivals[0][0] <= self.now:
                self._arrive(heapq.heappop(self.arrivals)[1])
            if backlog.jobs:
                self._answer(self.step())
                self.result.num_steps += 1
            elif self.arrivals:
                self.idle()
            else:
                break
        self.result.seconds = self.now
        return self.result

    def _arrive(self, i: int) -> None:
        client = self.clients[i]
        job = client.job(self.now)
        try:
            self.submit(job)
            self.owner[job] = i
        except errors.Overloaded as refused:
            self.result.outcomes[client.name, "429"] += 1
            self.refused.append(job)
            if client.repeats:
                heapq.heappush(self.arrivals, (self.now + refused.retry_after, i))

    def _answer(self, done: list[Job]) -> None:
        backlog = self.admission.backlog
        expired = [job for job in backlog.jobs if self.now > job.deadline]
        for job in expired:
            backlog.remove(job)
        for job in done + expired:
            client, is_late = self.clients[self.owner[job]], self.now > job.deadline
            self.result.outcomes[client.name, "504" if is_late else "200"] += 1
            if not is_late:
                self.result.latencies.setdefault(client.name, []).append(self.now - job.timings.submitted_at)
                self.result.num_images += job.request.count
            elif job not in self.predicted_late:
                self.result.late.append(job)
            if client.repeats:
                heapq.heappush(self.arrivals, (self.now + client.think, self.owner[job]))


def clients(n: int, **fields: Any) -> list[Client]:
    return [Client(**fields) for _ in range(n)]


def random_mix(seed: int, clip_evaluations: int = 0, second: str = "fast") -> list[Client]:
    """Returns clients with random image counts, timeouts, models, numbers of steps and tasks.

    With `clip_evaluations`, some of them use CLIP guidance. `second` is the model of a quarter of the clients. If it is
    `fast`, it supports only 4 steps.
    """
    choose, tasks, guide = random.Random(seed), random.Random(f"tasks {seed}"), random.Random(f"clip {seed}")
    numbers = itertools.count()
    mix: list[Client] = []
    for _ in range(choose.randint(1, 4)):
        model = choose.choice(["default", "default", "default", second])
        mix += clients(
            choose.choice([1, 1, 2, 4, 15, 40]),
            name=f"kind {next(numbers)}",
            count=choose.choice([1, 1, 1, 2, 8, 16, 64]),
            num_steps=4 if model == "fast" else choose.choice([100, 100, 50, 10]),
            guided=model != "fast" and choose.random() < 0.7,
            model=model,
            timeout=choose.choice([1.0, 2.0, 5.0, 10.0, 30.0]),
            start=choose.uniform(0, 2),
            think=choose.choice([0.001, 0.01, 0.3, 2.0]),
            task=tasks.choice(TASKS) if model != "fast" else "generate",
            clip_evaluations=guide.choice([0, clip_evaluations]),
        )
    return mix
