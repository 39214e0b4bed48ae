"""Plain FastAPI: a thread pool, and a lock around the network, since two draws at once would share the cores anyway."""

import threading

import uvicorn
from fastapi import FastAPI, Response

from scripts.benchmark.alternatives.painter import Painter, Request


def create_app(painter: Painter) -> FastAPI:
    """One request after the other, each as one batch."""
    app, lock = FastAPI(), threading.Lock()
    painter.draw([Request(digit=0, num_steps=2)])  # warm before it is asked

    @app.post("/generate")
    def generate(request: Request) -> Response:  # not a coroutine: FastAPI gives it to the thread pool
        with lock:
            (png,) = painter.draw([request])
        return Response(png, media_type="image/png")

    return app


def serve(port: int) -> None:
    """Until it is told to stop."""
    uvicorn.run(create_app(Painter()), host="127.0.0.1", port=port, log_level="warning")
