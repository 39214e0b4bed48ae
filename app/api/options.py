"""Adds the defaults of a model to the fields of a request, and checks what the model supports."""

from collections.abc import Iterable
from dataclasses import replace

from app import errors
from app.api.schemas import GenerateRequest, SamplingRequest
from app.engine.interface import ModelInfo
from app.engine.job import Options


def options_of(body: SamplingRequest, digit: int | None, info: ModelInfo) -> Options:
    """Returns the options of a request, with the defaults of its model.

    Raises InvalidRequest for a value that the model does not support. The path of the options is empty.
    """
    sampler = body.sampler or info.samplers[0]
    if sampler not in info.samplers:
        raise _unsupported("sampler", either(info.samplers), info)
    options = Options(
        digit=digit,
        seed=body.seed,
        num_steps=body.num_steps or info.default_steps,
        sampler=sampler,
        guidance_scale=body.guidance_scale or info.guidance_scale[sampler],
        model=info.name,
    )
    if digit is not None and digit >= info.num_classes:
        raise _unsupported("digit", f"less than or equal to {info.num_classes - 1}", info)
    if options.num_steps > info.max_steps:
        raise _unsupported("num_steps", f"less than or equal to {info.max_steps}", info)
    if info.steps and options.num_steps not in info.steps:
        raise _unsupported("num_steps", " or ".join(map(str, info.steps)), info)
    if options.guidance_scale != 1 and not info.guidable:
        raise _unsupported("guidance_scale", "1 (no guidance)", info)
    return options


def with_clip_options(options: Options, body: GenerateRequest, info: ModelInfo) -> Options:
    """Returns the options with those of CLIP guidance. Raises InvalidRequest for a prompt without a scale."""
    if not body.clip_guidance_scale:
        if body.clip_prompt is not None:
            raise errors.InvalidRequest.of("clip_prompt", "A prompt needs a clip_guidance_scale above 0")
        return options
    prompt = info.prompts[body.digit] if body.clip_prompt is None else body.clip_prompt
    return replace(options, clip_guidance_scale=body.clip_guidance_scale, clip_prompt=prompt)


def either(values: Iterable[str]) -> str:
    """Returns the values in quotation marks, joined by "or"."""
    return " or ".join(f"'{value}'" for value in values)


def _unsupported(field: str, supported: str, info: ModelInfo) -> errors.InvalidRequest:
    return errors.InvalidRequest.of(field, f"Input should be {supported} for model '{info.name}'")
