"""Calls a service with KServe's client. It runs in an environment that has the package kserve, without this project.

Usage: python kserve_client.py URL KEY. Prints a JSON object with the answers.
"""

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

DIGITS, SEEDS = np.array([7, 0, 7], dtype=np.int64), np.array([1, 2, 2**53 - 1], dtype=np.int64)


def request_of(*, is_binary: bool, **fields: Any) -> InferRequest:
    """Returns a request with the digits and seeds, whose inputs are binary or JSON."""
    inputs = []
    for name, elements in (("digit", DIGITS), ("seed", SEEDS)):
        tensor = InferInput(name, list(elements.shape), "INT64")
        tensor.set_data_from_numpy(elements, binary_data=is_binary)
        inputs.append(tensor)
    return InferRequest("default", inputs, **fields)


async def main(url: str, key: str) -> dict[str, Any]:
    """Returns the answers of the service, as JSON values."""
    headers = {"X-API-Key": key}
    steps = {"num_steps": 4, "sampler": "ddim"}
    requests = {
        "json": request_of(is_binary=False, request_id="42", parameters=steps),
        "binary": request_of(is_binary=True, parameters=steps | {"binary_data_output": True}),
        "mixed": request_of(
            is_binary=True,
            parameters=steps,
            request_outputs=[RequestedOutput("seed"), RequestedOutput("image", {"binary_data": True})],
        ),
    }
    answers: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        answers["live"] = await client.is_server_live(url)
        answers["ready"] = await client.is_server_ready(url)
        answers["model_ready"] = await client.is_model_ready(url, "default")
        answers["other_model_ready"] = await client.is_model_ready(url, "other")
        for name, request in requests.items():
            response = await client.infer(url, request, model_name="default", headers=dict(headers))
            answers[name] = {
                "id": response.id,
                "model_name": response.model_name,
                "outputs": {each.name: each.as_numpy().tolist() for each in response.outputs},
            }
        for name, sent, body in (
            ("no_key", {}, request_of(is_binary=False)),
            ("invalid", headers, request_of(is_binary=False, parameters={"num_steps": 101})),
        ):
            try:
                await client.infer(url, body, model_name="default", headers=dict(sent))
            except httpx.HTTPStatusError as error:
                answers[name] = {"status": error.response.status_code, "message": str(error)}
    return answers


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
