"""FastAPI with request-level batching: when a batch ends, all waiting requests form the next batch."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Response

from scripts.benchmark.alternatives.painter import Painter, Request


class Queue:
    """The waiting requests, and a task that generates their images in batches of at most `max_images`."""

    def __init__(self, painter: Painter, max_images: int) -> None:
        self._painter, self._max_images = painter, max_images
        self._waiting: deque[tuple[Request, asyncio.Future[bytes]]] = deque()
        self._has_requests = asyncio.Event()
        self._pool = ThreadPoolExecutor(1)

    async def draw(self, request: Request) -> bytes:
        """Waits for the batch of the request and returns a PNG of its images."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._has_requests.set()
        return await answer

    async def run(self) -> None:
        """Runs batches one after the other until the task is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._has_requests.wait()
            batch = self._next_batch()
            pngs = await loop.run_in_executor(self._pool, self._painter.draw, [request for request, _ in batch])
            for (_, answer), png in zip(batch, pngs, strict=True):
                if not answer.done():
                    answer.set_result(png)

    def _next_batch(self) -> list[tuple[Request, "asyncio.Future[bytes]"]]:
        batch = [self._waiting.popleft()]
        images = batch[0][0].count
        while self._waiting and images + self._waiting[0][0].count <= self._max_images:
            batch.append(self._waiting.popleft())
            images += batch[-1][0].count
        if not self._waiting:
            self._has_requests.clear()
        return batch


def create_app(painter: Painter, max_images: int) -> FastAPI:
    """Returns the application. A batch has at most `max_images` images, except for a larger single request."""
    painter.draw([Request(digit=0, num_steps=2)])  # warm up before the first request

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.queue = Queue(painter, max_images)
        running = asyncio.create_task(app.state.queue.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        return Response(await app.state.queue.draw(request), media_type="image/png")

    return app


def serve(port: int, max_images: int) -> None:
    """Runs the server until the process is stopped."""
    uvicorn.run(create_app(Painter(), max_images), host="127.0.0.1", port=port, log_level="warning")
