import gc
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from app import errors
from app.api.http import picture_queue, thread_priority
from app.api.http.picture_queue import PictureQueue, Step

TIMEOUT = 30.0
SECOND = 50_000_000  # pixels of work that take a second on the virtual clock
# Seconds of a small, a medium and a large request.
SMALL, MEDIUM, LARGE = 0.02, 0.2, 2.0
WAIT = 30  # seconds to wait for a thread before a test fails


class Clock:
    """A virtual clock. A step of `work` advances it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def step(self, work: int, then: Callable[[], Any] = lambda: None) -> Step[Any]:
        """Returns a step that takes the time of its work."""

        def run() -> Any:
            self.now += work / SECOND
            return then()

        return Step(work, run)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[PictureQueue]:
    """A queue with one worker, which has measured one second for SECOND."""
    monkeypatch.setattr(picture_queue, "NUM_WORKERS", 1)
    monkeypatch.setattr(picture_queue, "FIRST_SECONDS", 1 / SECOND)
    queue = PictureQueue(clock)
    yield queue
    queue.close()


class Blocker:
    """Keeps the only worker of a queue busy until it is released."""

    def __init__(self, queue: PictureQueue) -> None:
        self._begun, self._release = threading.Event(), threading.Event()
        queue.submit([Step(0, self._run)], TIMEOUT)
        assert self._begun.wait(WAIT)

    def _run(self) -> None:
        self._begun.set()
        self._release.wait(WAIT)

    def release(self) -> None:
        self._release.set()


def finish(*futures: Future[list[Any]]) -> None:
    for future in futures:
        future.result(WAIT)


def finish_all(futures: list[Future[list[Any]]]) -> None:
    """Waits for all futures of a list to which steps can append others."""
    while not all(future.done() for future in list(futures)):
        finish(*futures)


def submit(queue: PictureQueue, clock: Clock, seconds: float, timeout: float = TIMEOUT) -> Future[list[Any]]:
    return queue.submit([clock.step(int(seconds * SECOND))], timeout)


# Order


def test_small_request_waits_for_one_step_of_a_large_one(queue: PictureQueue, clock: Clock) -> None:
    """The small request arrives while the first of the 64 pictures is decoded."""
    order: list[str] = []
    small: list[Future[list[Any]]] = []

    def first() -> None:
        order.append("large")
        small.append(queue.submit([clock.step(SECOND // 100, partial(order.append, "small"))], TIMEOUT))

    rest = [clock.step(SECOND // 100, partial(order.append, "large")) for _ in range(63)]
    finish(queue.submit([clock.step(SECOND // 100, first), *rest], TIMEOUT))
    finish(*small)
    assert order == ["large", "small"] + ["large"] * 63


def test_lanes_take_turns_by_their_work(queue: PictureQueue, clock: Clock) -> None:
    """Short steps, such as those that parse a body, do not use up the turns of their lane."""
    order: list[str] = []
    blocker = Blocker(queue)
    large = queue.submit([clock.step(SECOND, partial(order.append, "large")) for _ in range(10)], TIMEOUT)
    medium = [queue.submit([clock.step(SECOND // 10, partial(order.append, "medium"))], TIMEOUT) for _ in range(10)]
    small = [queue.submit([clock.step(SECOND // 100, partial(order.append, "small"))], TIMEOUT) for _ in range(100)]
    blocker.release()
    finish(large, *medium, *small)
    assert order[:3] == ["small", "medium", "large"]
    assert (order[:113].count("small"), order[:113].count("medium"), order[:113].count("large")) == (100, 10, 3)


def test_requests_of_a_lane_are_finished_in_the_order_of_arrival(queue: PictureQueue, clock: Clock) -> None:
    order: list[int] = []
    blocker = Blocker(queue)
    futures = [
        queue.submit([clock.step(1000 * (5 - number), partial(order.append, number)) for _ in range(3)], TIMEOUT)
        for number in range(4)
    ]
    blocker.release()
    finish(*futures)
    assert order == sorted(order)
    assert len(order) == 12


@pytest.mark.parametrize("has_large", [False, True])
def test_medium_request_gets_its_share_while_small_ones_always_wait(
    queue: PictureQueue, clock: Clock, has_large: bool
) -> None:
    order: list[str] = []

    def step(name: str, then: Callable[[], Any] = lambda: None) -> Step[Any]:
        return clock.step(int(SMALL * SECOND), lambda: (order.append(name), then()))

    def follow() -> None:
        if order.count("medium") < 10:
            queue.submit([step("small", follow)], TIMEOUT)

    blocker = Blocker(queue)
    if has_large:
        queue.submit([step("large") for _ in range(250)], 1000.0)
    medium = queue.submit([step("medium") for _ in range(10)], TIMEOUT)
    for _ in range(2):
        queue.submit([step("small", follow)], TIMEOUT)
    blocker.release()
    finish(medium)
    until_finished = order[: len(order) - order[::-1].index("medium")]
    assert len(until_finished) == pytest.approx(30 if has_large else 20, abs=2)


def test_lane_does_not_save_up_the_time_in_which_it_was_empty(queue: PictureQueue, clock: Clock) -> None:
    order: list[str] = []

    def half_way() -> None:
        order.append("large")
        for _ in range(1000):
            queue.submit([clock.step(int(SMALL * SECOND), partial(order.append, "small"))], 1000.0)

    step = clock.step(int(SMALL * SECOND), partial(order.append, "large"))
    finish(queue.submit([*[step] * 100, clock.step(int(SMALL * SECOND), half_way), *[step] * 100], TIMEOUT))
    until_finished = order[: len(order) - order[::-1].index("large")]
    assert until_finished.count("small") == pytest.approx(100, abs=2)


def test_lane_that_was_served_alone_gets_its_share_when_another_lane_is_not_empty_any_more(
    queue: PictureQueue, clock: Clock
) -> None:
    def step(name: str) -> Step[Any]:
        return clock.step(int(SMALL * SECOND), partial(order.append, name))

    order: list[str] = []
    finish(queue.submit([step("large") for _ in range(200)], TIMEOUT))
    blocker = Blocker(queue)
    small = [queue.submit([step("small")], TIMEOUT) for _ in range(100)]
    large = queue.submit([step("large") for _ in range(100)], TIMEOUT)
    blocker.release()
    finish(large, *small)
    assert order[200:300].count("large") == pytest.approx(50, abs=2)


# Admission


def test_flood_of_large_requests_is_refused_with_the_time_until_there_is_room(
    queue: PictureQueue, clock: Clock
) -> None:
    blocker = Blocker(queue)
    admitted, refused = [], list[errors.Overloaded]()
    for _ in range(50):
        try:
            admitted.append(submit(queue, clock, 1.0))
        except errors.Overloaded as error:
            refused.append(error)
    assert {error.retry_after for error in refused} == {1}
    assert len(admitted) == TIMEOUT / 3
    with pytest.raises(errors.Overloaded) as late:
        submit(queue, clock, 5.0)
    assert late.value.retry_after == 5
    assert "decoded" in late.value.detail
    others = [submit(queue, clock, SMALL), submit(queue, clock, MEDIUM)]  # there is room in the other lanes
    blocker.release()
    finish(*others, *admitted)


def test_small_requests_are_admitted_when_the_worker_is_much_slower_than_predicted(
    queue: PictureQueue, clock: Clock
) -> None:
    """The large requests that were admitted before it became slower will be late."""
    is_admitted: list[bool] = []

    def slow() -> None:
        clock.now += 100

    def submit_both() -> None:
        for seconds in (1.0, 0.001):
            try:
                submit(queue, clock, seconds)
                is_admitted.append(True)
            except errors.Overloaded:
                is_admitted.append(False)

    steps = [*[Step(SECOND, slow)] * 3, Step(SECOND, submit_both), *[Step(SECOND, int)] * 10]
    finish(queue.submit(steps, 100.0))
    assert is_admitted == [False, True]


def test_many_small_requests_are_bounded_by_their_time_and_not_by_their_number(
    queue: PictureQueue, clock: Clock
) -> None:
    blocker = Blocker(queue)
    futures = list[Future[list[Any]]]()
    with pytest.raises(errors.Overloaded):
        while len(futures) < 10_000:
            futures.append(submit(queue, clock, 0.01))
    room = TIMEOUT / 3 / 0.01
    assert 0.98 * room <= len(futures) <= room
    blocker.release()
    finish(*futures)


def test_idle_queue_admits_every_request(queue: PictureQueue, clock: Clock) -> None:
    finish(submit(queue, clock, 100.0, timeout=1.0))


def test_prediction_follows_the_speed_of_the_worker(queue: PictureQueue, clock: Clock) -> None:
    """The machine becomes ten times slower. A request of one second on the faster machine then takes ten."""

    def slow() -> None:
        clock.now += 10

    for _ in range(40):
        finish(queue.submit([Step(SECOND, slow)], TIMEOUT))
    blocker = Blocker(queue)
    with pytest.raises(errors.Overloaded):
        submit(queue, clock, 1.0, timeout=28.0)
    future = submit(queue, clock, 1.0, timeout=31.0)
    blocker.release()
    finish(future)


def test_one_very_long_step_hardly_changes_the_prediction(queue: PictureQueue, clock: Clock) -> None:
    def suspended() -> None:
        clock.now += 100_000

    finish(queue.submit([Step(1000, suspended)], TIMEOUT))
    blocker = Blocker(queue)
    future = submit(queue, clock, 0.1, timeout=10.0)
    blocker.release()
    finish(future)


@pytest.mark.parametrize("seed", range(6))
def test_admitted_requests_of_a_random_overload_meet_their_deadline(
    queue: PictureQueue, clock: Clock, seed: int
) -> None:
    """Requests arrive three times as fast as one worker can answer them, in bursts, with different sizes and limits."""
    choose = random.Random(seed)
    sizes = [choose.choice([0.005, 0.02, 0.1, 0.3, 0.7, 2.5]) for _ in range(400)]
    times, now = [], clock.now
    for size in sizes:
        times.append(now)
        now += choose.choice([0, 2]) * size / 3
    arrivals = list(zip(times, sizes, strict=True))[::-1]
    late, refused, futures = list[float](), list[float](), list[Future[list[Any]]]()

    def arrive() -> None:
        while arrivals and arrivals[-1][0] <= clock.now:
            submit_next(*arrivals.pop())

    def submit_next(time: float, size: float) -> None:
        limit = choose.choice([TIMEOUT, 8.0])

        def check() -> None:
            late.extend([size] if clock.now > time + limit else [])

        count = max(1, round(size / 0.1))
        steps = [clock.step(int(size / count * SECOND), arrive) for _ in range(count)]
        try:
            future = queue.submit([*steps, Step(0, check)], limit - (clock.now - time))
        except errors.Overloaded:
            refused.append(size)
        else:
            futures.append(future)

    blocker = Blocker(queue)
    arrive()
    blocker.release()
    finish_all(futures)
    while arrivals:  # an idle queue waits for the next arrival
        clock.now = max(clock.now, arrivals[-1][0])
        arrive()
        finish_all(futures)
    assert len(futures) + len(refused) == len(sizes)
    assert late == []
    assert {size for size in refused if size >= 0.7}
    assert len([size for size in refused if size <= 0.02]) <= 0.05 * len(refused)


# End of a request


def test_results_are_in_the_order_of_the_steps(queue: PictureQueue) -> None:
    assert queue.submit([Step(1, partial(int, number)) for number in range(5)], TIMEOUT).result(WAIT) == [0, 1, 2, 3, 4]


def test_exception_of_a_step_drops_the_rest_of_the_request(queue: PictureQueue) -> None:
    def fail() -> None:
        raise errors.InvalidRequest.of("image", "damaged")

    ran: list[int] = []
    future = queue.submit([Step(1, fail), Step(SECOND, partial(ran.append, 1))], TIMEOUT)
    with pytest.raises(errors.InvalidRequest, match="damaged"):
        future.result(WAIT)
    finish(queue.submit([Step(1, int)], TIMEOUT))
    assert ran == []
    assert [(lane.requests, lane.work_left) for lane in queue._lanes] == [({}, 0)] * 3


@pytest.mark.parametrize(
    "refused",
    [errors.InvalidImage.of("image", "truncated"), errors.FieldError("mask", "empty")],
    ids=["image", "field"],
)
def test_refused_picture_is_released_with_its_file(queue: PictureQueue, refused: Exception) -> None:
    """The frames of the exception's traceback would keep them until a garbage collection."""

    class Picture:
        pass

    released: list[bool] = []

    def fail() -> None:
        picture = Picture()
        weakref.finalize(picture, released.append, True)
        try:
            raise ValueError("truncated")
        except ValueError as error:
            raise refused from error

    gc.disable()
    try:
        with pytest.raises(type(refused)):
            queue.submit([Step(1, fail)], TIMEOUT).result(WAIT)
        finish(queue.submit([Step(1, int)], TIMEOUT))
        assert released == [True]
    finally:
        gc.enable()


def test_cancelled_request_releases_its_files_and_its_room_at_once(queue: PictureQueue, clock: Clock) -> None:
    class File:
        def read(self) -> None:
            raise AssertionError("the step of a cancelled request ran")

    blocker, file = Blocker(queue), File()
    future = queue.submit([Step(100 * SECOND, file.read)], 1000.0)
    reference = weakref.ref(file)
    del file
    assert reference()
    future.cancel()
    assert not reference()
    assert sum(len(lane.requests) for lane in queue._lanes) == 1  # the blocker
    assert [lane.work_left for lane in queue._lanes] == [0] * 3
    blocker.release()


def test_close_cancels_waiting_and_later_requests(queue: PictureQueue) -> None:
    blocker = Blocker(queue)
    waiting = queue.submit([Step(1, int)], TIMEOUT)
    queue.close()
    assert waiting.cancelled()
    assert queue.submit([Step(1, int)], TIMEOUT).cancelled()
    blocker.release()


def test_close_cancels_a_running_request(queue: PictureQueue) -> None:
    begun, go_on, ran = threading.Event(), threading.Event(), list[int]()

    def first() -> None:
        begun.set()
        go_on.wait(WAIT)

    future = queue.submit([Step(1, first), Step(1, partial(ran.append, 1))], TIMEOUT)
    assert begun.wait(WAIT)
    queue.close()
    assert future.cancelled()
    go_on.set()
    queue._workers.shutdown(wait=True)
    assert ran == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness for each thread")
def test_workers_have_a_lower_priority_than_the_other_threads() -> None:
    queue = PictureQueue()

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    (of_worker,) = queue.submit([Step(1, niceness)], TIMEOUT).result(WAIT)
    assert of_worker == min(19, own + thread_priority.NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    queue.close()
