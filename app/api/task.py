"""What a request asks of the engine, apart from its deadline and its client: the common form of all tasks."""

from dataclasses import dataclass, field
from typing import Any

from app.api.schemas import GenerateResponse, ImagesResponse
from app.engine.job import Comparison, Input, Options, Search


@dataclass(frozen=True, slots=True)
class Task:
    """The job of a request, and the parts of its answer that the job does not determine."""

    options: Options
    count: int = 1
    timeout: float | None = None  # seconds; None: UNFOG_REQUEST_TIMEOUT
    input: Input | None = None
    comparison: Comparison | None = None  # if given, it is the result, and no image is generated
    search: Search | None = None  # if given, the digit is searched first
    num_steps: int = 0  # the number of steps in the request; the path can have another number
    scale: int = 1
    response: type[ImagesResponse] = GenerateResponse
    facts: dict[str, Any] = field(default_factory=dict)  # the fields of `response` that ImagesResponse does not have
    chunks: dict[str, str] = field(default_factory=dict)  # further text chunks of the PNG files
