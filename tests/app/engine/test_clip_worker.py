"""Tests of the CLIP thread with a fake model, whose calls the tests hold and release."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from app import errors
from app.engine import clip_worker
from app.engine.clip_worker import BATCH, ClipWorker
from app.engine.job import Pixels
from tests.app.clip_fakes import DIGIT_PROMPTS, FakeClip, embedding
from tests.app.fakes import WAIT_SECONDS


@contextmanager
def opened(clip: FakeClip) -> Iterator[ClipWorker]:
    """Runs a worker whose start has finished. Only later calls block or fail."""
    worker, on_call = ClipWorker(), clip.on_call
    clip.on_call = lambda batch: None
    worker.open(clip, REAL_DIGITS)
    result(worker.score(images(0), DIGIT_PROMPTS, 30))
    clip.batches.clear()
    clip.on_call = on_call
    try:
        yield worker
    finally:
        worker.close(errors.Draining(1))
        worker.join(WAIT_SECONDS)
        assert not worker._thread.is_alive()


def result(future: Future[Any]) -> Any:
    return future.result(WAIT_SECONDS)


def images(*levels: int) -> list[Pixels]:
    return [np.full((2, 2), level, np.uint8) for level in levels]


REAL_DIGITS = [images(label) for label in range(10)]


class Hold:
    """An `on_call` function that blocks each call with images until `release` is called."""

    def __init__(self) -> None:
        self.entered, self._released = threading.Semaphore(0), threading.Semaphore(0)
        self.is_on = True

    def __call__(self, batch: Sequence[Any]) -> None:
        if self.is_on and not isinstance(batch[0], str):
            self.entered.release()
            assert self._released.acquire(timeout=WAIT_SECONDS)

    def wait(self) -> None:
        assert self.entered.acquire(timeout=WAIT_SECONDS)

    def release(self) -> None:
        self._released.release()

    def end(self) -> None:
        self.is_on = False
        self._released.release(1000)


def test_similarities_are_the_dot_products_of_the_embeddings() -> None:
    with opened(FakeClip()) as worker:
        levels, prompts = range(20), ["a", "bb"]
        scores = result(worker.score(images(*levels), prompts, 30))
    expected = [[np.cos(level - len(prompt)) for prompt in prompts] for level in levels]
    np.testing.assert_allclose(scores.similarities, expected, atol=1e-6)
    assert scores.timings.submitted_at <= scores.timings.started_at <= scores.timings.finished_at


def test_known_prompts_are_not_embedded() -> None:
    clip = FakeClip()
    with opened(clip) as worker:
        found = worker.embed_prompts(DIGIT_PROMPTS)
        assert found.done()
        np.testing.assert_allclose(found.result(), [embedding(prompt) for prompt in DIGIT_PROMPTS], rtol=1e-6)
    assert clip.prompts == []


def test_closing_the_worker_closes_the_model_and_ends_the_call_without_a_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    started, ended = threading.Event(), threading.Event()

    def block(batch: Sequence[Any]) -> None:
        if batch[0] == "new":
            started.set()
            assert ended.wait(WAIT_SECONDS)
            raise RuntimeError("closed")

    clip = FakeClip(on_call=block)
    with opened(clip) as worker:
        future = worker.embed_prompts(["new"])
        assert started.wait(WAIT_SECONDS)
        worker.close(errors.Draining(1))
        assert clip.is_closed
        ended.set()
        with pytest.raises(errors.Draining):
            result(future)
    assert caplog.records == []


def test_real_digits_are_embedded_once_and_have_the_mean_similarity_of_each_class() -> None:
    clip, prompts = FakeClip(), ["a", "bb"]
    twice = [images(label, label + 1) for label in range(10)]
    worker = ClipWorker()
    worker.open(clip, twice)
    scores = [result(worker.score(images(3), prompts, 30)) for _ in range(2)]
    worker.close(errors.Draining(1))
    worker.join(WAIT_SECONDS)
    expected = [
        [(np.cos(label - len(prompt)) + np.cos(label + 1 - len(prompt))) / 2 for label in range(10)]
        for prompt in prompts
    ]
    for each in scores:
        np.testing.assert_allclose(each.real_digits, expected, atol=1e-6)
        assert each.num_real_digits == 20
    assert clip.batches == [BATCH, BATCH, 4, 1, 1]


def test_prompt_is_compared_with_the_real_digits_of_a_class_after_they_are_embedded() -> None:
    hold, levels = Hold(), [[digit, digit + 1] for digit in range(10)]
    worker = ClipWorker()
    worker.open(FakeClip(on_call=hold), [images(*each) for each in levels])
    text = np.array(embedding("ab"), np.float32)
    hold.wait()
    assert worker.compare_with_real_digits(3, text) is None
    hold.end()
    scores = result(worker.score(images(0), ["a"], 30))
    typical = np.mean([np.cos(level - len(DIGIT_PROMPTS[digit])) for digit in range(10) for level in levels[digit]])
    assert scores.typical == pytest.approx(typical, abs=1e-6)
    best = max(np.cos(3 - 2), np.cos(4 - 2))
    assert worker.compare_with_real_digits(3, text) == pytest.approx((best, typical), abs=1e-6)
    worker.close(errors.Draining(1))
    worker.join(WAIT_SECONDS)


def test_images_are_embedded_in_batches_of_one_request() -> None:
    clip = FakeClip()
    with opened(clip) as worker:
        futures = [worker.score(images(*range(count)), ["a"], 30) for count in (BATCH + 1, 2)]
        assert [len(result(future).similarities) for future in futures] == [BATCH + 1, 2]
    assert clip.batches == [BATCH, 1, 2]


def test_prompts_are_embedded_before_the_next_batch_of_images() -> None:
    hold = Hold()
    clip = FakeClip(on_call=hold)
    with opened(clip) as worker:
        scoring = worker.score(images(*range(2 * BATCH)), ["a"], 30)
        hold.wait()
        prompt = worker.embed_prompts(["new"])
        hold.end()
        assert result(prompt).tolist() == pytest.approx(np.array([embedding("new")]), abs=1e-6)
        result(scoring)
    assert clip.calls[-3:] == ["images", "prompts", "images"]


def test_cached_prompt_is_not_embedded_again() -> None:
    clip = FakeClip()
    with opened(clip) as worker:
        first = result(worker.embed_prompts(["new", DIGIT_PROMPTS[0]]))
        future = worker.embed_prompts(["new", DIGIT_PROMPTS[0]])
        assert future.done()
        assert np.array_equal(future.result(), first)
    assert clip.prompts == ["new"]


def test_full_cache_drops_the_least_recently_used_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_worker, "MAX_CACHED_PROMPTS", 12)
    clip = FakeClip()
    with opened(clip) as worker:
        for prompt in ("x", "y", DIGIT_PROMPTS[0], "z", DIGIT_PROMPTS[0], DIGIT_PROMPTS[1]):
            result(worker.embed_prompts([prompt]))
    assert clip.prompts == ["x", "y", "z", DIGIT_PROMPTS[1]]


def test_cancelled_request_ends_after_its_current_batch_and_frees_its_room() -> None:
    hold = Hold()
    clip = FakeClip(on_call=hold)
    with opened(clip) as worker:
        running = worker.score(images(*range(4 * BATCH)), ["a"], 30)
        waiting = worker.score(images(*range(4 * BATCH)), ["a"], 30)
        hold.wait()
        assert running.cancel()
        assert waiting.cancel()
        assert worker._images == {}
        hold.end()
        assert len(result(worker.score(images(1), ["a"], 30)).similarities) == 1
    assert clip.batches == [BATCH, 1]


def test_error_of_a_call_fails_only_its_request(caplog: pytest.LogCaptureFixture) -> None:
    def fail(batch: Sequence[Any]) -> None:
        if not isinstance(batch[0], str) and batch[0].max() == 13:
            raise ValueError("secret")

    with opened(FakeClip(on_call=fail)) as worker:
        bad, good = worker.score(images(13), ["a"], 30), worker.score(images(1), ["a"], 30)
        with pytest.raises(errors.InternalError):
            result(bad)
        assert len(result(good).similarities) == 1
    assert "CLIP request failed" in caplog.text


def test_more_waiting_images_than_the_limit_are_refused_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_worker, "MAX_WAITING_IMAGES", 10)
    hold = Hold()
    with opened(FakeClip(on_call=hold)) as worker:
        first = worker.score(images(*range(6)), ["a"], 30)
        worker.score(images(*range(4)), ["a"], 30)
        with pytest.raises(errors.Overloaded) as refused:
            worker.score(images(1), ["a"], 30)
        assert refused.value.retry_after == 1
        with pytest.raises(errors.Overloaded):
            worker.check_admission(1, ["a"], 30)
        hold.release()
        result(first)
        worker.check_admission(1, ["a"], 30)
        assert not worker.score(images(1), ["a"], 30).done()
        hold.end()


def test_request_that_would_be_late_is_refused_with_the_seconds_after_which_it_fits() -> None:
    hold = Hold()
    with opened(FakeClip(on_call=hold)) as worker:
        worker._seconds = 0.5  # for one embedding
        worker.score(images(*range(64)), [DIGIT_PROMPTS[0]], 1)  # An idle thread admits every request.
        worker.score(images(*range(6)), [DIGIT_PROMPTS[0]], 35)  # 70 embeddings take 35 s
        with pytest.raises(errors.Overloaded) as late:
            worker.score(images(*range(4)), [DIGIT_PROMPTS[0]], 30)  # 74 embeddings take 37 s
        assert late.value.retry_after == 7
        with pytest.raises(errors.Overloaded) as never:
            worker.score(images(*range(4)), [DIGIT_PROMPTS[0]], 1)
        assert never.value.retry_after == 35  # all waiting embeddings
        worker.score(images(*range(4)), [DIGIT_PROMPTS[0]], 37)
        hold.end()


def test_restart_of_the_model_hardly_lengthens_the_predicted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    durations = iter([0.01] * 100)

    def advance(batch: Sequence[Any]) -> None:
        clock[0] += len(batch) * next(durations)

    monkeypatch.setattr(clip_worker.time, "perf_counter", lambda: clock[0])
    worker = ClipWorker()
    worker.open(FakeClip(on_call=advance), REAL_DIGITS)
    result(worker.score(images(*range(BATCH)), ["new"], 30))
    assert worker._seconds == pytest.approx(0.01)
    durations = iter([5.0, 0.01])  # the model starts again
    result(worker.score(images(1), ["newer"], 30))
    worker.close(errors.Draining(1))
    worker.join(WAIT_SECONDS)
    assert worker._seconds is not None
    assert worker._seconds < 0.03


def test_prompts_that_are_not_cached_count_in_the_predicted_time() -> None:
    hold = Hold()
    with opened(FakeClip(on_call=hold)) as worker:
        worker.score(images(1), [DIGIT_PROMPTS[0]], 30)
        hold.wait()
        worker._seconds = 1.0
        with pytest.raises(errors.Overloaded):
            worker.score(images(1), ["new"], 2.5)
        worker.score(images(1), [DIGIT_PROMPTS[1]], 2.5)
        hold.end()


def test_requests_with_prompts_are_refused_if_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_worker, "MAX_WAITING_PROMPTS", 2)
    hold = Hold()
    with opened(FakeClip(on_call=hold)) as worker:
        worker.score(images(1), [DIGIT_PROMPTS[0]], 30)
        hold.wait()
        waiting = [worker.embed_prompts([text]) for text in ("a", "b")]
        with pytest.raises(errors.Overloaded):
            worker.embed_prompts(["c"])
        assert worker.embed_prompts([DIGIT_PROMPTS[0]]).done()  # a cached prompt does not wait
        hold.end()
        assert [len(result(future)) for future in waiting] == [1, 1]


def test_close_answers_all_requests_and_refuses_further_ones() -> None:
    hold = Hold()
    clip = FakeClip(on_call=hold)
    with opened(clip) as worker:
        futures: list[Future[Any]] = [worker.score(images(*range(3 * BATCH)), ["a"], 30) for _ in range(2)]
        hold.wait()
        futures.append(worker.embed_prompts(["new"]))
        worker.close(errors.EngineFailed(3))
        for future in futures:
            assert isinstance(future.exception(WAIT_SECONDS), errors.EngineFailed)
        with pytest.raises(errors.EngineFailed):
            worker.score(images(1), ["a"], 30)
        hold.end()
    assert clip.batches == [BATCH]


def test_worker_that_is_closed_before_its_model_is_loaded_starts_no_thread() -> None:
    before = set(threading.enumerate())  # a thread of an earlier test may not have ended yet
    worker = ClipWorker()
    worker.close(errors.Draining(1))
    worker.open(FakeClip(), REAL_DIGITS)
    assert not any(thread.name == "clip" for thread in set(threading.enumerate()) - before)
    worker.join(WAIT_SECONDS)


def test_cancelled_future_raises_for_its_caller_only() -> None:
    hold = Hold()
    with opened(FakeClip(on_call=hold)) as worker:
        first, second = (worker.score(images(1), ["a"], 30) for _ in range(2))
        hold.wait()
        first.cancel()
        hold.end()
        with pytest.raises(CancelledError):
            result(first)
        assert result(second)
