"""Servers for a pipeline of diffusers: the server example of diffusers, and LitServe with its own batching.

Both generate images with the pipeline itself, which calls its network with one timestep for the whole batch. A request
has its own seed, as `"noise": "torch"` in this service.
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
    """Returns a PNG for each request. All requests have the same number of steps, since the pipeline has one."""
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

    Each has a scheduler of its own, because a scheduler has a state. The threads share the processor.
    """
    app, shared = FastAPI(), new_pipeline(folder)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        own = type(shared)(shared.unet, shared.scheduler.from_config(shared.scheduler.config))
        own.set_progress_bar_config(disable=True)
        (png,) = await asyncio.get_running_loop().run_in_executor(None, draw, own, [request])
        return Response(png, media_type="image/png")

    return app


def serve_example(port: int, folder: Path) -> None:
    """Runs the server example until the process is stopped."""
    uvicorn.run(create_app(folder), host="127.0.0.1", port=port, log_level="warning")


def serve_litserve(port: int, folder: Path, max_images: int, batch_timeout: float) -> None:
    """Runs LitServe until the process is stopped. A batch makes one call of the pipeline for each number of steps."""
    import litserve

    class PipelineAPI(litserve.LitAPI):  # type: ignore[misc] # untyped
        def setup(self, device: str) -> None:
            self.pipeline = new_pipeline(folder)

        def decode_request(self, request: Request) -> Request:
            return request

        def batch(self, inputs: list[Request]) -> list[Request]:
            return inputs

        def predict(self, requests: list[Request]) -> list[bytes]:
            pngs = dict[int, bytes]()
            for num_steps in sorted({request.num_steps for request in requests}):
                places = [place for place, request in enumerate(requests) if request.num_steps == num_steps]
                pngs |= dict(zip(places, draw(self.pipeline, [requests[place] for place in places]), strict=True))
            return [pngs[place] for place in range(len(requests))]

        def unbatch(self, output: list[bytes]) -> list[bytes]:
            return output

        def encode_response(self, output: bytes) -> Response:
            return Response(output, media_type="image/png")

    api = PipelineAPI(max_batch_size=max_images, batch_timeout=batch_timeout, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
