"""FastAPI with request-level batching: all that waits when the last batch ends is drawn as the next one."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Response

from scripts.benchmark.alternatives.painter import Painter, Request


class Queue:
    """Requests that wait, and one task that draws as many of them at once as make up `max_images`."""

    def __init__(self, painter: Painter, max_images: int) -> None:
        self._painter, self._max_images = painter, max_images
        self._waiting: deque[tuple[Request, asyncio.Future[bytes]]] = deque()
        self._news = asyncio.Event()
        self._pool = ThreadPoolExecutor(1)

    async def draw(self, request: Request) -> bytes:
        """A PNG of all its images."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._news.set()
        return await answer

    async def run(self) -> None:
        """Batch after batch, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._news.wait()
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
            self._news.clear()
        return batch


def create_app(painter: Painter, max_images: int) -> FastAPI:
    """Batches of at most so many images."""
    painter.draw([Request(digit=0, num_steps=2)])  # warm before it is asked

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
    """Until it is told to stop."""
    uvicorn.run(create_app(Painter(), max_images), host="127.0.0.1", port=port, log_level="warning")
