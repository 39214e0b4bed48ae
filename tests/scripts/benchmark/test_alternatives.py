"""The alternative servers generate the same images as `model.sampler`, in any batch."""

import asyncio
import io
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import load
from model.sampler import sample
from scripts.benchmark.alternatives import batched, locked
from scripts.benchmark.alternatives.painter import Painter, Request
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

REQUESTS = [
    Request(digit=3, seed=5, num_steps=4, sampler="ddim"),
    Request(digit=1, seed=2**53 - 1, count=3, num_steps=9),
    Request(digit=8, seed=0, count=2, num_steps=1, sampler="dpmpp"),
]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("scripts.benchmark.alternatives.painter.fast_dtype", lambda device: torch.float32)
    return save_tiny_checkpoint(tmp_path / "tiny.safetensors")


def expected(path: Path, request: Request) -> np.ndarray:
    """Returns the images of the request, (B, H, W) with levels 0 to 255, from `model.sampler`."""
    loaded = load(path)
    x_0 = sample(
        loaded.network,
        loaded.schedule,
        torch.full((request.count,), request.digit),
        seed=torch.full((request.count,), request.seed),
        index=torch.arange(request.count),
        image_shape=loaded.image_shape,
        sampler=request.sampler,
        num_steps=request.num_steps,
        prediction=loaded.prediction,
    )
    return ((x_0[:, 0] + 1) * 127.5).round().numpy()


def images_in(png: bytes, count: int, size: int) -> np.ndarray:
    sheet = np.asarray(Image.open(io.BytesIO(png)), dtype=float)
    rows, columns = sheet.shape[0] // size, sheet.shape[1] // size
    return sheet.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(-1, size, size)[:count]


def test_images_of_a_request_are_the_same_alone_and_in_a_batch(path: Path) -> None:
    painter = Painter(path, compiled=False)
    for request, png in zip(REQUESTS, painter.draw(REQUESTS), strict=True):
        wanted = expected(path, request)
        assert np.abs(images_in(png, request.count, wanted.shape[1]) - wanted).max() <= 1
        assert painter.draw([request]) == [png]


@pytest.mark.parametrize("max_images", [0, 1, 4, 64], ids=["locked", "one", "some", "all"])
def test_server_answers_each_request_with_its_own_images(path: Path, max_images: int) -> None:
    painter = Painter(path, compiled=False)
    app = batched.create_app(painter, max_images) if max_images else locked.create_app(painter)

    async def send_all() -> list[bytes]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            answers = await asyncio.gather(*(client.post("/generate", json=r.model_dump()) for r in REQUESTS))
        return [answer.content for answer in answers]

    assert asyncio.run(send_all()) == [painter.draw([request])[0] for request in REQUESTS]
