"""The server example of diffusers for a pipeline.

It generates images with the pipeline itself, which calls its network with one timestep for the whole batch. A request
has its own seed, as with `"noise": "torch"` in this service.
"""

import asyncio
import io
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field


class Request(BaseModel):
    """The fields of POST /generate that the benchmark uses."""

    count: int = Field(default=1, ge=1, le=64)
    seed: int = 0
    num_steps: int = Field(default=50, ge=1, le=1000)


def new_pipeline(folder: Path) -> Any:
    """Loads the pipeline without a progress bar."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, requests: list[Request]) -> list[bytes]:
    """Returns the first image of each request as a PNG.

    All requests must have the same number of steps, because one call of the pipeline has one number.
    """
    seeds = [request.seed + index for request in requests for index in range(request.count)]
    images = pipeline(
        batch_size=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=requests[0].num_steps,
    ).images
    first = 0
    found = []
    for request in requests:
        found.append(_png(images[first]))
        first += request.count
    return found


def create_app(folder: Path) -> FastAPI:
    """Returns an application like examples/server of diffusers: each request runs the pipeline in a thread.

    Each has a scheduler of its own, because a scheduler changes during a run. The threads share the processor.
    """
    app, shared = FastAPI(), new_pipeline(folder)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        own = type(shared)(shared.unet, shared.scheduler.from_config(shared.scheduler.config))
        own.set_progress_bar_config(disable=True)
        (png,) = await asyncio.get_running_loop().run_in_executor(None, draw, own, [request])
        return Response(png, media_type="image/png")

    return app


def serve(port: int, folder: Path) -> None:
    """Runs the server example until the process is stopped."""
    uvicorn.run(create_app(folder), host="127.0.0.1", port=port, log_level="warning")


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
