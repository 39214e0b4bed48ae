"""LitServe with its own batching for a pipeline of diffusers."""

import os
from pathlib import Path

import litserve
from fastapi import Response

from scripts.benchmark.alternatives.pipelines import Request, draw, new_pipeline

FOLDER = "PIPELINE_FOLDER"  # variable with the folder, because the worker is another process


class PipelineAPI(litserve.LitAPI):  # type: ignore[misc] # untyped
    """Makes one call of the pipeline for each number of steps in a batch, in LitServe's worker process."""

    def setup(self, device: str) -> None:
        """Loads the pipeline in the worker."""
        self.pipeline = new_pipeline(Path(os.environ[FOLDER]))

    def decode_request(self, request: Request) -> Request:
        """Returns the request as it is, since FastAPI has validated it."""
        return request

    def batch(self, inputs: list[Request]) -> list[Request]:
        """Returns the list as it is."""
        return inputs

    def predict(self, requests: list[Request]) -> list[bytes]:
        """Returns a PNG for each request."""
        pngs = dict[int, bytes]()
        for num_steps in sorted({request.num_steps for request in requests}):
            places = [place for place, request in enumerate(requests) if request.num_steps == num_steps]
            pngs |= dict(zip(places, draw(self.pipeline, [requests[place] for place in places]), strict=True))
        return [pngs[place] for place in range(len(requests))]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """Returns the list as it is, with one PNG per request."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """Returns the response with the PNG."""
        return Response(output, media_type="image/png")


def serve(port: int, folder: Path, max_images: int, batch_timeout: float) -> None:
    """Runs the server until the process is stopped."""
    os.environ[FOLDER] = str(folder)
    api = PipelineAPI(max_batch_size=max_images, batch_timeout=batch_timeout, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
