"""The task of a request: what the engine computes, and what the response contains. All tasks have this form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.api.schemas import GenerateResponse, ImagesResponse
from app.engine.job import ClipTarget, ImageKey, Input, Options, Search
from model.comparison import Comparison

# The response fields about CLIP guidance of a task without it.
NO_CLIP: Mapping[str, Any] = {"clip_guidance_scale": 0.0, "clip_prompt": None, "clip": None, "warning": None}


@dataclass(frozen=True, slots=True)
class Task:
    """What the engine computes for a request, and the parts of the response that the task determines."""

    options: Options
    count: int = 1
    timeout: float | None = None  # seconds; None: the default
    input: Input | None = None
    comparison: Comparison | None = None  # if given, it is the result, and no image is generated
    search: Search | None = None  # if given, the job first searches for the digit
    num_steps: int = 0  # the number of steps in the request; the path can have another number
    scale: int = 1
    response: type[ImagesResponse] = GenerateResponse
    facts: Mapping[str, Any] = field(default_factory=dict)  # the fields of `response` that ImagesResponse does not have
    result_facts: Callable[[], dict[str, Any]] = dict  # further ones, when the job is finished
    images: tuple[ImageKey, ...] = ()  # as in JobRequest
    clip: ClipTarget | None = None  # None: no CLIP guidance
    clip_sha256: str = ""  # digest of the weights of the model of CLIP guidance
    chunks: dict[str, str] = field(default_factory=dict)  # further text chunks of the PNG files
