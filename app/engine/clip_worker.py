"""The thread that embeds prompts and images with CLIP.

The thread divides its work into short parts: one prompt, or a batch of images. After each part it selects the next one.
Prompts come first, because they are short, and requests to /generate wait for them. Requests with images are processed
in order of arrival. A cancelled request is dropped after its current part. The thread waits on a condition while there
is no work.

Each prompt is embedded alone, and batches contain the images of one request only. Results therefore do not depend on
other requests.

A request with images is refused with 429 if too many images wait, or if it would miss its deadline. The time is
predicted from the number of waiting embeddings and the measured seconds per embedding. An idle thread admits every
request, because only new measurements correct a wrong prediction.
"""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app import errors
from app.engine.interface import ClipEmbedder, Embeddings
from app.engine.job import Pixels, Timings
from model.prompts import digit_prompt

log = logging.getLogger(__name__)

MAX_WAITING_IMAGES = 1024
MAX_WAITING_PROMPTS = 1024  # requests whose prompts wait
MAX_CACHED_PROMPTS = 1024
BATCH = 8  # images of one call
NEW_SHARE = 0.2  # weight of the newest call in the moving average of the seconds per embedding
MAX_JUMP = 10.0  # a call counts at most as this multiple of the average, because it can include a start of the model
LONGEST_WAIT = 3600  # maximum Retry-After, in seconds

Embedding = npt.NDArray[np.float32]  # (E,)
Similarities = npt.NDArray[np.float32]
Parts = Generator[int, None, Any]  # computes one part for each next(), yields its number of embeddings


@dataclass(frozen=True, slots=True)
class Scores:
    """The result of a request with images."""

    similarities: Similarities  # (N, P): cosine similarity of each image and each prompt
    real_digits: Similarities  # (P, 10): mean similarity of each prompt and the real digits of each class
    num_real_digits: int
    typical: float  # mean similarity of a real digit and its own prompt, such as "a handwritten digit seven"
    timings: Timings


@dataclass(frozen=True, slots=True)
class _RealDigits:
    """The embeddings of the real digits, and their mean similarity to their own prompts."""

    embeddings: npt.NDArray[np.float32]  # (10, M, E)
    typical: float


@dataclass(slots=True)
class _Work:
    """The work of one request."""

    parts: Parts
    num_images: int = 0  # all images of the request, until it is answered
    num_left: int = 0  # embeddings that are not computed yet


class ClipWorker:
    """Embeds prompts and images in its own thread. Any thread may call the public methods. Only `join` waits."""

    def __init__(self) -> None:
        self._embedder: ClipEmbedder | None = None
        self._real_digits: Sequence[Sequence[Pixels]] = ()
        self._real: _RealDigits | None = None  # None until the thread has embedded them
        self._condition = threading.Condition()
        self._prompts: dict[Future[Any], _Work] = {}  # requests for embeddings of prompts, oldest first
        self._images: dict[Future[Any], _Work] = {}  # requests with images, oldest first
        self._cache: OrderedDict[str, Embedding] = OrderedDict()  # by prompt, the least recently used one first
        self._seconds: float | None = None  # moving average for an embedding; None before the first call
        self._closed_with: errors.UnfogError | None = None
        self._thread = threading.Thread(target=self._run, name="clip", daemon=True)

    def open(self, embedder: ClipEmbedder | None, real_digits: Sequence[Sequence[Pixels]]) -> None:
        """Starts the thread with this model. Does nothing without a model.

        The thread first embeds `real_digits`: the same number of images of each class.
        """
        with self._condition:
            if not embedder or self._closed_with:
                return
            self._embedder, self._real_digits = embedder, real_digits
            self._cache.update(embedder.known)
            self._add(self._images, _Work(self._real_parts(), num_left=sum(map(len, real_digits))))
            self._thread.start()

    def embed_prompts(self, prompts: Sequence[str]) -> Future[Embeddings]:
        """Returns a future of the embeddings (P, E). It is completed already if all prompts are cached.

        Raises Overloaded if too many requests wait.
        """
        with self._condition:
            cached = [embedding for prompt in prompts if (embedding := self._cached(prompt)) is not None]
            if len(cached) == len(prompts):
                done: Future[Embeddings] = Future()
                done.set_result(np.stack(cached))
                return done
            if len(self._prompts) >= MAX_WAITING_PROMPTS:
                raise errors.Overloaded(self._retry_after(1))
            return self._add(self._prompts, _Work(self._prompt_parts(prompts)))

    def compare_with_real_digits(self, digit: int, embedding: Embedding) -> tuple[float, float] | None:
        """Returns the highest similarity of a prompt and a real image of the digit, and the typical one of `Scores`.

        Returns None if the real digits are not embedded yet. The thread embeds them after the start, when no prompt
        waits.
        """
        with self._condition:
            real = self._real
        return None if real is None else (float((real.embeddings[digit] @ embedding).max()), real.typical)

    def check_admission(self, num_images: int, prompts: Sequence[str], timeout: float) -> None:
        """Raises Overloaded if `score` would refuse such a request now."""
        with self._condition:
            self._refuse_unless_room(num_images, self._num_new(num_images, prompts), timeout)

    def score(self, images: Sequence[Pixels], prompts: Sequence[str], timeout: float) -> Future[Scores]:
        """Returns a future of the similarities of each image and each prompt. Cancelling it drops the request.

        Raises Overloaded if too many images wait, or if the result is not expected within `timeout` seconds.
        """
        with self._condition:
            work = _Work(
                self._score_parts(images, prompts, Timings()), len(images), self._num_new(len(images), prompts)
            )
            self._refuse_unless_room(work.num_images, work.num_left, timeout)
            return self._add(self._images, work)

    def close(self, error: errors.UnfogError) -> None:
        """Answers all requests with the error, and ends the thread after its current call."""
        with self._condition:
            self._closed_with = error
            futures = [*self._prompts, *self._images]
            self._condition.notify()
        if self._embedder:
            self._embedder.close()
        for future in futures:
            _complete(future, error)

    def join(self, timeout: float) -> None:
        """Waits until the thread has ended, at most `timeout` seconds."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _add(self, queue: dict[Future[Any], _Work], work: _Work) -> Future[Any]:
        """Adds a request to a queue. It leaves the queue when its future is completed or cancelled."""
        if self._closed_with:
            raise self._closed_with
        future: Future[Any] = Future()
        queue[future] = work
        future.add_done_callback(lambda _: self._remove(queue, future))
        self._condition.notify()
        return future

    def _remove(self, queue: dict[Future[Any], _Work], future: Future[Any]) -> None:
        with self._condition:
            queue.pop(future, None)

    def _num_new(self, num_images: int, prompts: Sequence[str]) -> int:
        """Returns the number of embeddings that a request needs. The lock must be held."""
        return num_images + sum(prompt not in self._cache for prompt in prompts)

    def _refuse_unless_room(self, num_images: int, num_embeddings: int, timeout: float) -> None:
        """Raises Overloaded if the request has too many images, or would be late behind the waiting requests."""
        waiting = self._images.values()
        excess = sum(each.num_images for each in waiting) + num_images - MAX_WAITING_IMAGES
        if excess > 0:
            detail = f"Too many images wait for CLIP (images of this request: {num_images}). Retry later"
            raise errors.Overloaded(self._retry_after(excess), detail)
        left = sum(each.num_left for each in waiting)
        late = left + num_embeddings - timeout / self._seconds if self._seconds else 0
        if left and late > 0:
            detail = "This request would miss its deadline. Retry later or request fewer images"
            raise errors.Overloaded(self._retry_after(min(late, left)), detail)

    def _retry_after(self, num_embeddings: float) -> int:
        """Returns the predicted whole seconds for this number of embeddings, at least 1."""
        return max(1, min(math.ceil(num_embeddings * (self._seconds or 0.0)), LONGEST_WAIT))

    def _run(self) -> None:
        assert self._embedder, "open() sets the model before it starts the thread"
        while selected := self._select():
            future, work = selected
            try:
                self._run_part(work)
            except StopIteration as end:
                _complete(future, end.value)
            except Exception as error:
                if self._closed_with:  # close() has ended the call and answered the request
                    return
                log.error("CLIP request failed", exc_info=error)
                _complete(future, errors.InternalError())

    def _select(self) -> tuple[Future[Any], _Work] | None:
        """Waits for work. Returns the request to continue, or None if the thread must end."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed_with or self._prompts or self._images)
            return None if self._closed_with else next(iter((self._prompts or self._images).items()))

    def _run_part(self, work: _Work) -> None:
        """Runs one part and measures its time. Raises StopIteration after the last part."""
        start = time.perf_counter()
        count = next(work.parts)
        seconds = (time.perf_counter() - start) / count
        with self._condition:
            work.num_left = max(0, work.num_left - count)  # a request can also embed the real digits
            before = seconds if self._seconds is None else self._seconds
            self._seconds = before + NEW_SHARE * (min(seconds, MAX_JUMP * before) - before)

    def _prompt_parts(self, prompts: Sequence[str]) -> Generator[int, None, Embeddings]:
        """Embeds the prompts that are not cached, one in each part."""
        assert self._embedder
        found = []
        for prompt in prompts:
            embedding = self._cached(prompt)
            if embedding is None:
                (embedding,) = self._embedder.embed_prompts([prompt])
                with self._condition:
                    self._cache[prompt] = embedding
                    while len(self._cache) > MAX_CACHED_PROMPTS:
                        self._cache.popitem(last=False)
                yield 1
            found.append(embedding)
        return np.stack(found)

    def _score_parts(
        self, images: Sequence[Pixels], prompts: Sequence[str], timings: Timings
    ) -> Generator[int, None, Scores]:
        """Embeds the prompts, and then the images."""
        timings.started_at = time.monotonic()
        real = yield from self._real_parts()
        of_prompts = yield from self._prompt_parts(prompts)
        of_images = yield from self._image_parts(images)
        timings.finished_at = time.monotonic()
        return Scores(
            of_images @ of_prompts.T,
            (real.embeddings @ of_prompts.T).mean(axis=1).T,
            real.embeddings.shape[0] * real.embeddings.shape[1],
            real.typical,
            timings,
        )

    def _real_parts(self) -> Generator[int, None, _RealDigits]:
        """Embeds the real digits, unless this is done already."""
        if self._real is None:
            images = [image for images in self._real_digits for image in images]
            of_images = yield from self._image_parts(images)
            of_prompts = yield from self._prompt_parts([digit_prompt(digit) for digit in range(10)])  # (10, E)
            embeddings = of_images.reshape(10, -1, of_images.shape[1])  # (10, M, E)
            typical = float((embeddings * of_prompts[:, None]).sum(axis=2).mean())
            with self._condition:
                self._real = _RealDigits(embeddings, typical)
        return self._real

    def _image_parts(self, images: Sequence[Pixels]) -> Generator[int, None, Embeddings]:
        """Embeds images, one batch in each part."""
        assert self._embedder
        found = []
        for first in range(0, len(images), BATCH):
            batch = images[first : first + BATCH]
            found.append(self._embedder.embed_images(batch))
            yield len(batch)
        return np.concatenate(found)

    def _cached(self, prompt: str) -> Embedding | None:
        """Returns the embedding of a prompt if it is cached."""
        with self._condition:
            if prompt in self._cache:
                self._cache.move_to_end(prompt)
            return self._cache.get(prompt)


def _complete(future: Future[Any], result: Any) -> None:
    """Completes a future with a result or an error. Does nothing if it is cancelled or completed already."""
    with suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
