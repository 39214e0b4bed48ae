"""Chooses the model, the steps and the scale of a request of the OpenAI Images API."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app import errors
from app.api.openai.prompt import label_of_prompt
from app.api.openai.schemas import AUTO, ImageEditRequest, ImageGenerationRequest, ImagesRequest, UsedQuality
from app.engine.interface import ModelInfo
from app.engine.job import FAST_MODEL
from app.tasks.names import either
from app.tasks.sampling import max_scale_of
from model.spec import Quality

AUTO_SIDE = 280  # pixels; the largest multiple of the size of an image that is not above it is used
OPENAI_MODELS = ("gpt-image-", "dall-e-", "chatgpt-image-")  # prefixes of the names of OpenAI's image models

_SIZE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How the images of a request are generated."""

    info: ModelInfo
    label: int  # the class that the prompt names
    scale: int
    quality: UsedQuality  # the quality that is used
    fields: Mapping[str, Any]  # the fields of the request to this service that differ from its defaults

    @property
    def size(self) -> str:
        """The size of an image in pixels."""
        return size_name(self.info.image_shape[1], self.scale)


def plan_generation(body: ImageGenerationRequest, models: Mapping[str, ModelInfo], largest_request: int) -> ImagePlan:
    """Returns how the images are generated. Raises InvalidRequest if the model does not permit a field."""
    info = _model_of(body, models)
    if body.quality == "low" and info is _default(models):
        info = _fast(models) or info
    plan = _planned(body, info, largest_request)
    if info is _fast(models):
        return replace(plan, quality="low")
    match body.quality:
        case "low":
            return _with_setting(plan, "low", "draft")
        case "medium":
            return _with_setting(plan, "medium", "balanced")
    return plan


def plan_edit(
    body: ImageEditRequest,
    models: Mapping[str, ModelInfo],
    largest_request: int,
    has_edits: Callable[[ModelInfo], bool],
) -> ImagePlan:
    """Returns how the images are edited. `has_edits` returns True for a model that supports edits.

    Raises InvalidRequest if the model does not permit a field.
    """
    info = _model_of(body, models)
    if not has_edits(info):
        others = [name for name, each in models.items() if has_edits(each)]
        what_to_do = f". Use {either(others)}" if others else ""
        raise errors.InvalidRequest.of("model", f"The model '{info.name}' does not support edits{what_to_do}")
    plan = _planned(body, info, largest_request)
    needs_few_steps = body.quality in ("low", "medium") and body.mask is None
    return _with_setting(plan, "medium", "balanced") if needs_few_steps else plan


def scale_of(size: str, side: int) -> int:
    """Returns the enlargement of images of `side` x `side` pixels that gives the size.

    Raises InvalidRequest if there is none. The message names the nearest permitted sizes.
    """
    most = max_scale_of(side)
    if size == AUTO:
        return min(max(1, AUTO_SIDE // side), most)
    match = _SIZE.fullmatch(size)
    if not match:
        largest = size_name(side, most)
        reason = f"Input should be '{AUTO}' or a size from {size_name(side, 1)} to {largest} in steps of {side} pixels"
        raise errors.InvalidRequest.of("size", reason)
    width, height = map(int, match.groups())
    if width == height and width % side == 0 and width <= most * side:
        return width // side
    mean = (width + height) / 2 / side  # The square with this side is nearest to a size that is not square.
    nearest = dict.fromkeys(min(max(scale, 1), most) for scale in (int(mean), -int(-mean // 1)))
    names = [size_name(side, scale) for scale in nearest]
    reason = f"Images are square, and their sides are multiples of {side} pixels up to {most * side}"
    raise errors.InvalidRequest.of("size", f"{reason}. The nearest permitted size is {' or '.join(names)}")


def size_name(side: int, scale: int) -> str:
    """Returns the size of images of `side` x `side` pixels after their enlargement, such as 280x280."""
    return f"{side * scale}x{side * scale}"


def _model_of(body: ImagesRequest, models: Mapping[str, ModelInfo]) -> ModelInfo:
    if body.model is None:
        return _default(models)
    if body.model in models:
        return models[body.model]
    if body.model.startswith(OPENAI_MODELS):
        return _default(models)
    raise errors.InvalidRequest.of("model", f"Input should be {either(models)}, or the name of an OpenAI image model")


def _default(models: Mapping[str, ModelInfo]) -> ModelInfo:
    return next(iter(models.values()))


def _fast(models: Mapping[str, ModelInfo]) -> ModelInfo | None:
    """Returns the model `fast` if it is served and generates the same images as the default model."""
    fast, default = models.get(FAST_MODEL), _default(models)
    is_same = fast and (fast.class_names, fast.image_shape) == (default.class_names, default.image_shape)
    return fast if is_same else None


def _planned(body: ImagesRequest, info: ModelInfo, largest_request: int) -> ImagePlan:
    """Returns the plan with the defaults of the model.

    Raises InvalidRequest if the settings or the model do not permit the request.
    """
    if body.n > largest_request:
        raise errors.InvalidRequest.of("n", f"Input should be less than or equal to {largest_request}")
    try:
        label = label_of_prompt(body.prompt, info)
    except ValueError as error:
        raise errors.InvalidRequest.of("prompt", str(error)) from error
    fields = {} if body.seed is None else {"seed": body.seed}
    return ImagePlan(info, label, scale_of(body.size, info.image_shape[1]), "high", fields)


def _with_setting(plan: ImagePlan, name: UsedQuality, quality: Quality) -> ImagePlan:
    """Returns the plan with the sampler and the steps of a quality of this service, and its name in OpenAI's API."""
    setting = plan.info.setting_of(quality)
    return replace(plan, quality=name, fields={**plan.fields, **setting._asdict()})
