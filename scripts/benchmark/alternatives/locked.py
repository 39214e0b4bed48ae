"""Plain FastAPI with a lock: one request at a time, since concurrent requests would only share the cores."""

import threading

import uvicorn
from fastapi import FastAPI, Response

from scripts.benchmark.alternatives.painter import Painter, Request


def create_app(painter: Painter) -> FastAPI:
    """Returns an application that runs one request after the other, each as one batch."""
    app, lock = FastAPI(), threading.Lock()
    painter.draw([Request(digit=0, num_steps=2)])  # warm up before the first request

    @app.post("/generate")
    def generate(request: Request) -> Response:  # not a coroutine, so that FastAPI runs it in its thread pool
        with lock:
            (png,) = painter.draw([request])
        return Response(png, media_type="image/png")

    return app


def serve(port: int) -> None:
    """Runs the server until the process is stopped."""
    uvicorn.run(create_app(Painter()), host="127.0.0.1", port=port, log_level="warning")
