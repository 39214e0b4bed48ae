"""LitServe with its own batching. Batch size and timeout follow its documentation."""

import litserve
from fastapi import Response

from model.compiled.memory import keep_freed_memory
from scripts.benchmark.alternatives.painter import Painter, Request


class DigitAPI(litserve.LitAPI):  # type: ignore[misc] # untyped
    """Generates the images of all requests of a batch together, in LitServe's worker process."""

    def setup(self, device: str) -> None:
        """Loads the checkpoint in the worker."""
        keep_freed_memory()
        self.painter = Painter()
        self.painter.draw([Request(digit=0, num_steps=2)])  # warm up before the first request

    def decode_request(self, request: Request) -> Request:
        """Returns the request as it is, since FastAPI has validated it."""
        return request

    def batch(self, inputs: list[Request]) -> list[Request]:
        """Returns the list as it is, since the painter takes a list."""
        return inputs

    def predict(self, requests: list[Request]) -> list[bytes]:
        """Returns a PNG for each request."""
        return self.painter.draw(requests)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """Returns the list as it is, with one PNG per request."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """Returns the response with the PNG."""
        return Response(output, media_type="image/png")


def serve(port: int, max_images: int, batch_timeout: float) -> None:
    """Runs the server until the process is stopped."""
    api = DigitAPI(max_batch_size=max_images, batch_timeout=batch_timeout, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
