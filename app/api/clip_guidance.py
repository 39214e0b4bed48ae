"""CLIP guidance of a request: its options, its prompt as an embedding, and its facts for the response."""

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import Request

from app import errors
from app.api.generation import Service
from app.api.requests import cancel_on_disconnect
from app.api.schemas import GenerateRequest, ModelName
from app.api.task import Task
from app.engine.interface import ClipInfo, ModelInfo
from app.engine.job import ClipTarget, Options


def with_clip_options(options: Options, body: GenerateRequest, info: ModelInfo) -> Options:
    """Returns the options with those of CLIP guidance. Raises InvalidRequest for a prompt without a scale."""
    if not body.clip_guidance_scale:
        if body.clip_prompt is not None:
            raise errors.InvalidRequest.of("clip_prompt", "A prompt needs a clip_guidance_scale above 0")
        return options
    prompt = info.prompts[body.digit] if body.clip_prompt is None else body.clip_prompt
    return replace(options, clip_guidance_scale=body.clip_guidance_scale, clip_prompt=prompt)


async def guided_by_clip(request: Request, service: Service, task: Task) -> Task:
    """Returns the task with the embedding of its prompt, and with the facts of the response about CLIP guidance.

    Raises NotAvailable if the task has CLIP guidance and no CLIP model is loaded, DeadlineExceeded if the prompt was not
    embedded before the deadline, and ClientGoneError after a disconnect.
    """
    options = task.options
    if not options.clip_guidance_scale:
        return replace(task, facts={**task.facts, **_facts(options, None)})
    clip = service.clip.info
    future = service.clip.embed_prompts([options.clip_prompt])
    try:
        async with asyncio.timeout(task.timeout or service.settings.request_timeout):
            (text,) = await cancel_on_disconnect(request, asyncio.wrap_future(future))
    except TimeoutError:
        raise errors.DeadlineExceeded from None
    steps = service.info(options.model).clip_steps(options)
    target = ClipTarget(options.clip_guidance_scale, text, steps, service.engine.clip_evaluations)
    return replace(task, clip=target, clip_sha256=clip.sha256, facts={**task.facts, **_facts(options, clip)})


def _facts(options: Options, clip: ClipInfo | None) -> dict[str, Any]:
    return {
        "clip_guidance_scale": options.clip_guidance_scale,
        "clip_prompt": options.clip_prompt or None,
        "clip": clip and ModelName(name=clip.name, sha256=clip.sha256),
    }
