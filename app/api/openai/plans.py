"""Chooses the model, the steps and the scale of a request of the OpenAI Images API."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app import errors
from app.api.openai.schemas import AUTO, ImageEditRequest, ImageGenerationRequest, ImagesRequest
from app.engine.interface import ModelInfo
from app.engine.job import DEFAULT_MODEL, FAST_MODEL
from app.tasks.names import either
from model.png import MAX_SCALE
from model.spec import Sampler

AUTO_SCALE = 10
MEDIUM_STEPS = 10
MEDIUM_SAMPLER: Sampler = "dpmpp"
OPENAI_MODELS = ("gpt-image-", "dall-e-", "chatgpt-image-")  # prefixes of the names of OpenAI's image models

_SIZE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class Plan:
    """How the images of a request are generated."""

    info: ModelInfo
    scale: int
    quality: Literal["low", "medium", "high"]  # the quality that is used
    fields: Mapping[str, Any]  # the fields of the request to this service that differ from its defaults

    @property
    def size(self) -> str:
        """The size of an image in pixels."""
        return size_name(self.info.image_shape[1], self.scale)


def plan_generation(body: ImageGenerationRequest, models: Mapping[str, ModelInfo], largest_request: int) -> Plan:
    """Returns how the images are generated. Raises InvalidRequest if the model does not permit a field."""
    info = _model_of(body, models)
    if body.quality == "low" and info.name == DEFAULT_MODEL:
        info = models.get(FAST_MODEL, info)
    _check(body, info, largest_request)
    scale = scale_of(body.size, info.image_shape[1])
    if info.name == FAST_MODEL:
        return Plan(info, scale, "low", _sampling(body))
    return _with_steps(body, info, scale)


def plan_edit(
    body: ImageEditRequest,
    models: Mapping[str, ModelInfo],
    largest_request: int,
    has_edits: Callable[[ModelInfo], bool],
) -> Plan:
    """Returns how the images are edited. `has_edits` returns True for a model that supports edits.

    Raises InvalidRequest if the model does not permit a field.
    """
    info = _model_of(body, models)
    if not has_edits(info):
        others = [name for name, each in models.items() if has_edits(each)]
        what_to_do = f". Use {either(others)}" if others else ""
        raise errors.InvalidRequest.of("model", f"The model '{info.name}' does not support edits{what_to_do}")
    _check(body, info, largest_request)
    scale = scale_of(body.size, info.image_shape[1])
    if body.mask is not None:
        return Plan(info, scale, "high", _sampling(body))
    return _with_steps(body, info, scale)


def scale_of(size: str, side: int) -> int:
    """Returns the enlargement of images of `side` x `side` pixels that gives the size.

    Raises InvalidRequest if there is none. The message names the nearest permitted sizes.
    """
    if size == AUTO:
        return AUTO_SCALE
    match = _SIZE.fullmatch(size)
    if not match:
        largest = size_name(side, MAX_SCALE)
        reason = f"Input should be '{AUTO}' or a size from {size_name(side, 1)} to {largest} in steps of {side} pixels"
        raise errors.InvalidRequest.of("size", reason)
    width, height = map(int, match.groups())
    if width == height and width % side == 0 and width <= MAX_SCALE * side:
        return width // side
    mean = (width + height) / 2 / side  # The square with this side is nearest to a size that is not square.
    nearest = dict.fromkeys(min(max(scale, 1), MAX_SCALE) for scale in (int(mean), -int(-mean // 1)))
    names = [size_name(side, scale) for scale in nearest]
    reason = f"Images are square, and their sides are multiples of {side} pixels up to {MAX_SCALE * side}"
    raise errors.InvalidRequest.of("size", f"{reason}. The nearest permitted size is {' or '.join(names)}")


def size_name(side: int, scale: int) -> str:
    """Returns the size of images of `side` x `side` pixels after their enlargement, such as 280x280."""
    return f"{side * scale}x{side * scale}"


def _model_of(body: ImagesRequest, models: Mapping[str, ModelInfo]) -> ModelInfo:
    if body.model in models:
        return models[body.model]
    if body.model.startswith(OPENAI_MODELS):
        return models[DEFAULT_MODEL]
    raise errors.InvalidRequest.of("model", f"Input should be {either(models)}, or the name of an OpenAI image model")


def _check(body: ImagesRequest, info: ModelInfo, largest_request: int) -> None:
    """Raises InvalidRequest if the settings or the model do not permit the request."""
    if body.n > largest_request:
        raise errors.InvalidRequest.of("n", f"Input should be less than or equal to {largest_request}")
    if body.digit >= info.num_classes:
        reason = f"The model '{info.name}' generates only the digits 0 to {info.num_classes - 1}. Name one of them"
        raise errors.InvalidRequest.of("prompt", reason)


def _with_steps(body: ImagesRequest, info: ModelInfo, scale: int) -> Plan:
    """Returns the plan for a model that permits several numbers of steps."""
    is_permitted = MEDIUM_SAMPLER in info.samplers and info.max_steps >= MEDIUM_STEPS
    is_permitted = is_permitted and (not info.steps or MEDIUM_STEPS in info.steps)
    if body.quality in ("low", "medium") and is_permitted:
        steps = {"num_steps": MEDIUM_STEPS, "sampler": MEDIUM_SAMPLER}
        return Plan(info, scale, "medium", {**_sampling(body), **steps})
    return Plan(info, scale, "high", _sampling(body))


def _sampling(body: ImagesRequest) -> dict[str, Any]:
    return {} if body.seed is None else {"seed": body.seed}
