"""The events of a stream of the OpenAI Images API."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from app.api.http.error_formats import openai_error
from app.api.http.events import event_text
from app.api.openai.schemas import CompletedImage, PartialImage
from app.engine.job import ImageDone, Job, Progress
from app.errors import UnfogError
from app.tasks.images import encode_base64, encode_image
from model.png import Provenance


class OpenAIEvents:
    """Formats an event `partial_image` for each preview, an event `completed` for each image, and the event `error`.

    Previews have the size of the images. An image has no preview after it is finished.
    """

    def __init__(
        self, kind: str, facts: Mapping[str, Any], scale: int, max_partial: int, provenance: Callable[[], Provenance]
    ) -> None:
        """`kind` is the prefix of the types, and `facts` are the fields that all events have.

        `max_partial` limits the number of previews of each image.
        """
        self.image_scale = self.preview_scale = scale
        self._kind, self._facts, self._max_partial, self._provenance = kind, facts, max_partial, provenance
        self._num_partial: Counter[int] = Counter()  # index -> number of its previews so far
        self._finished: set[int] = set()

    def accepted(self, job: Job) -> str:
        """Returns an empty text, because OpenAI's API has no such event."""
        return ""

    def progress(self, event: Progress) -> str:
        """Returns an event for each unfinished image that has started, up to the limit of its previews."""
        if event.step == event.of:  # The finished images follow.
            return ""
        texts = []
        for index, pixels in enumerate(event.previews):
            is_due = index not in self._finished and self._num_partial[index] < self._max_partial
            if is_due and pixels.any():  # The preview of an image that has not started is black.
                partial = PartialImage(
                    b64_json=encode_base64(encode_image(pixels, self.preview_scale)),
                    created_at=int(time.time()),
                    partial_image_index=self._num_partial[index],
                    index=index,
                    **self._facts_of("partial_image"),
                )
                self._num_partial[index] += 1
                texts.append(_text(partial.type, partial))
        return "".join(texts)

    def image(self, event: ImageDone) -> str:
        """Returns the event for a finished image."""
        self._finished.add(event.index)
        png = encode_image(event.pixels, self.image_scale, self._provenance().text(event.index))
        completed = CompletedImage(
            b64_json=encode_base64(png),
            created_at=int(time.time()),
            index=event.index,
            **self._facts_of("completed"),
        )
        return _text(completed.type, completed)

    def done(self, job: Job) -> str:
        """Returns an empty text, because the stream ends after the last image."""
        return ""

    def error(self, error: UnfogError, request_id: str) -> str:
        """Returns the event `error`. The clients of OpenAI raise an exception for it."""
        return event_text("error", {"error": openai_error(error)})

    def _facts_of(self, name: str) -> dict[str, Any]:
        return {"type": f"{self._kind}.{name}", **self._facts}


def _text(name: str, event: BaseModel) -> str:
    return event_text(name, event.model_dump())
