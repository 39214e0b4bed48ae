"""LitServe: its own batching, the batch and its timeout as its documentation tunes them."""

import litserve
from fastapi import Response

from model.compiled.memory import keep_freed_memory
from scripts.benchmark.alternatives.painter import Painter, Request


class DigitAPI(litserve.LitAPI):  # type: ignore[misc] # untyped
    """Requests of one batch drawn as one; the worker is a process of its own."""

    def setup(self, device: str) -> None:
        """Loads the checkpoint in the worker."""
        keep_freed_memory()
        self.painter = Painter()
        self.painter.draw([Request(digit=0, num_steps=2)])  # warm before it is asked

    def decode_request(self, request: Request) -> Request:
        """FastAPI has checked it."""
        return request

    def batch(self, inputs: list[Request]) -> list[Request]:
        """As they are: the painter takes a list."""
        return inputs

    def predict(self, requests: list[Request]) -> list[bytes]:
        """A PNG each."""
        return self.painter.draw(requests)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """One each."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """A PNG."""
        return Response(output, media_type="image/png")


def serve(port: int, max_images: int, batch_timeout: float) -> None:
    """Until it is told to stop."""
    api = DigitAPI(max_batch_size=max_images, batch_timeout=batch_timeout, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
