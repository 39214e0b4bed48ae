"""A fake CLIP model with predictable embeddings, which can block or fail."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from app.engine.interface import ClipInfo, Embeddings
from app.engine.job import Pixels
from app.runner.clip_process import embed
from model.clip import Clip
from model.prompts import digit_prompt

DIGIT_PROMPTS = tuple(map(digit_prompt, range(10)))
CLIP_INFO = ClipInfo("fake", "c" * 64)


def embedding(text: str) -> list[float]:
    """Returns an embedding of length 1 that depends on the text."""
    angle = float(len(text))
    return [np.cos(angle), np.sin(angle)]


class LocalClip:
    """The embedded CLIP model in this process, instead of a child process that takes seconds to start."""

    info = ClipInfo("embedded", "e" * 64)

    def __init__(self) -> None:
        self._clip = Clip()
        self.known: dict[str, npt.NDArray[np.float32]] = {}

    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        return embed(self._clip, prompts)

    def embed_images(self, images: Sequence[Pixels]) -> Embeddings:
        return embed(self._clip, images)

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        return self._clip.unknown_words(prompts)

    def close(self) -> None:
        pass


@dataclass
class FakeClip:
    """Embeds an image as the angle of its mean grey level. `on_call` is called first and can raise or block."""

    info: ClipInfo = CLIP_INFO
    on_call: Callable[[Sequence[str] | Sequence[Pixels]], None] = lambda batch: None
    prompts: list[str] = field(default_factory=list)  # the embedded prompts
    batches: list[int] = field(default_factory=list)  # the sizes of the embedded batches of images
    calls: list[str] = field(default_factory=list)  # "prompts" or "images" for each call
    unknown: Collection[str] = ()  # the words that the model has not learned
    is_closed: bool = False

    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        self.on_call(prompts)
        self.calls.append("prompts")
        self.prompts += prompts
        return np.array([embedding(prompt) for prompt in prompts], np.float32)

    def embed_images(self, images: Sequence[Pixels]) -> Embeddings:
        self.on_call(images)
        self.calls.append("images")
        self.batches.append(len(images))
        angles = [float(image.mean()) for image in images]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        return [word for prompt in prompts for word in prompt.split() if word in self.unknown]

    @property
    def known(self) -> dict[str, npt.NDArray[np.float32]]:
        return {prompt: np.array(embedding(prompt), np.float32) for prompt in DIGIT_PROMPTS}

    def close(self) -> None:
        self.is_closed = True
