"""Sends the images of a task as JSON or as events of the OpenAI Images API."""

import time
from functools import partial

from fastapi import Request
from starlette.responses import Response

from app.api.generation import Service, event_stream, finished_response
from app.api.images import encode_base64, encode_images
from app.api.openai.events import OpenAIEvents
from app.api.openai.options import Plan
from app.api.openai.prompt import description_of
from app.api.openai.schemas import CreatedImages, ImageData, ImagesRequest
from app.api.responses import JSON
from app.api.stream_options import StreamOptions
from app.api.task import Task
from app.engine.job import Job, Pixels


async def respond(
    request: Request, service: Service, body: ImagesRequest, plan: Plan, task: Task, kind: str
) -> Response:
    """Submits a task and returns its response. `kind` is the prefix of the types of its events.

    Raises the errors of Service.submit and of finish.
    """
    if body.stream:

        def events_of(job: Job) -> OpenAIEvents:
            provenance = partial(service.provenance, task, job)
            return OpenAIEvents(kind, plan, task.options.seed, body.partial_images, provenance)

        # Previews are evenly spread and the last one is the image itself, which is not sent twice.
        stream = StreamOptions(body.partial_images + 1 if body.partial_images else 0)
        return event_stream(request, service, task, stream, events_of)

    def encode(job: Job, images: list[Pixels]) -> bytes:
        pngs = encode_images(images, service.provenance(task, job), task.scale)
        prompt = description_of(body.digit)
        response = CreatedImages(
            created=int(time.time()),
            data=[ImageData(b64_json=encode_base64(png), revised_prompt=prompt) for png in pngs],
            quality=plan.quality,
            size=plan.size,
            seed=task.options.seed,
            model=plan.info.name,
        )
        return response.model_dump_json().encode()

    return await finished_response(request, service, task, encode, JSON)
