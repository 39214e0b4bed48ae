"""The Open Inference Protocol with unmodified clients: Triton's client and KServe's client."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
import yaml
from tritonclient.utils import InferenceServerException

from tests.app.api.inference.bodies import INFER, PROTOCOL, body_of
from tests.e2e.conftest import Start, start_service
from tests.e2e.process import ROOT, TIMEOUT, wait_until
from tests.e2e.service import Service, open_png, pngs

KEY = "a-key-of-some-length"
DIGITS, SEEDS = [7, 0, 7], [1, 2, 2**53 - 1]
OPTIONS = {"num_steps": 4, "sampler": "ddim"}
KSERVE = "kserve>=0.21,<0.22"
KSERVE_PYTHON = "KSERVE_PYTHON"  # the variable with an interpreter that has this package
CONFIG = Path(__file__).with_name("open_inference.toml")
KSERVE_CLIENT = Path(__file__).with_name("kserve_client.py")


@pytest.fixture(scope="module")
def protected(checkpoint: Path, fast_checkpoint: Path) -> Iterator[Service]:
    """A service with a key and two models."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_FAST_CHECKPOINT=str(fast_checkpoint),
            UNFOG_API_KEYS=KEY,
            UNFOG_MAX_BATCH="64",
            UNFOG_REQUEST_TIMEOUT="300",
        )


@pytest.fixture
def client(protected: Service) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(protected.url.removeprefix("http://")) as opened:
        yield opened


def key_header() -> dict[str, str]:
    """Returns a new dictionary with the key, because Triton's client adds its own headers to the dictionary."""
    return {"X-API-Key": KEY}


def input_of(name: str, elements: list[int], *, is_binary: bool) -> triton.InferInput:
    tensor = triton.InferInput(name, [len(elements)], "INT64")
    tensor.set_data_from_numpy(np.array(elements, dtype=np.int64), binary_data=is_binary)
    return tensor


def inputs_of(*, is_binary: bool = True) -> list[triton.InferInput]:
    return [input_of("digit", DIGITS, is_binary=is_binary), input_of("seed", SEEDS, is_binary=is_binary)]


def generated(service: Service, digit: int, seed: int, **options: Any) -> npt.NDArray[np.uint8]:
    """Returns the pixels of POST /generate for a digit and a seed, with shape (H, W, 1)."""
    response = service.post({"digit": digit, "seed": seed, **options}, **key_header())
    pixels, _, _ = open_png(pngs(response)[0])
    return pixels[..., None]


@pytest.fixture(scope="module")
def expected(protected: Service) -> npt.NDArray[np.uint8]:
    """Returns the images of POST /generate for DIGITS and SEEDS, with shape (N, H, W, 1)."""
    return np.stack([generated(protected, *pair, **OPTIONS) for pair in zip(DIGITS, SEEDS, strict=True)])


# Triton's client


def test_triton_reads_the_state_and_the_metadata_without_a_key(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("default")
    assert client.is_model_ready("fast")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("default")
    assert [(each["name"], each["datatype"], each["shape"]) for each in metadata["inputs"]] == [
        ("digit", "INT64", [-1]),
        ("seed", "INT64", [-1]),
    ]
    assert [(each["name"], each["datatype"], each["shape"]) for each in metadata["outputs"]] == [
        ("image", "UINT8", [-1, 28, 28, 1]),
        ("seed", "INT64", [-1]),
    ]


@pytest.mark.parametrize("has_binary_inputs", [True, False])
@pytest.mark.parametrize("has_binary_outputs", [True, False, None])
def test_triton_gets_the_pixels_of_generate(
    client: triton.InferenceServerClient,
    expected: npt.NDArray[np.uint8],
    has_binary_inputs: bool,
    has_binary_outputs: bool | None,
) -> None:
    names = ("seed", "image")
    outputs = has_binary_outputs is not None and [
        triton.InferRequestedOutput(name, binary_data=has_binary_outputs) for name in names
    ]
    result = client.infer(
        "default",
        inputs_of(is_binary=has_binary_inputs),
        outputs=outputs or None,
        request_id="42",
        parameters=OPTIONS,
        headers=key_header(),
    )
    assert np.array_equal(result.as_numpy("image"), expected)
    assert result.as_numpy("image").dtype == np.uint8
    assert result.as_numpy("seed").tolist() == SEEDS
    response = result.get_response()
    assert (response["id"], response["model_name"]) == ("42", "default")
    assert [each["name"] for each in response["outputs"]] == list(names if outputs else names[::-1])


def test_triton_gets_only_the_requested_output(client: triton.InferenceServerClient) -> None:
    result = client.infer(
        "fast",
        [input_of("digit", [3], is_binary=True)],
        outputs=[triton.InferRequestedOutput("image")],
        headers=key_header(),
    )
    assert result.as_numpy("image").shape == (1, 28, 28, 1)
    assert result.as_numpy("seed") is None


def test_seeds_that_the_service_chose_reproduce_the_images(
    client: triton.InferenceServerClient, protected: Service
) -> None:
    result = client.infer(
        "default", [input_of("digit", DIGITS, is_binary=True)], parameters=OPTIONS, headers=key_header()
    )
    seeds = result.as_numpy("seed").tolist()
    assert seeds == [(seeds[0] + i) % 2**53 for i in range(3)]
    images = [generated(protected, digit, seed, **OPTIONS) for digit, seed in zip(DIGITS, seeds, strict=True)]
    assert np.array_equal(result.as_numpy("image"), np.stack(images))


def test_triton_sends_requests_at_the_same_time(protected: Service, expected: npt.NDArray[np.uint8]) -> None:
    address = protected.url.removeprefix("http://")
    with triton.InferenceServerClient(address, concurrency=4) as client:
        pending = [
            client.async_infer("default", inputs_of(), parameters=OPTIONS, headers=key_header()) for _ in range(4)
        ]
        for each in pending:
            assert np.array_equal(each.get_result().as_numpy("image"), expected)


@pytest.mark.parametrize(
    ("model", "fields", "status", "message"),
    [
        ("default", {"headers": {}}, "401", "An API key is required"),
        ("default", {"headers": {"X-API-Key": "wrong"}}, "403", "The API key is invalid"),
        ("other", {}, "404", "The models are: default, fast"),
        ("default", {"model_version": "1"}, "404", "No route has this path"),
        ("default", {"parameters": {"num_steps": 101}}, "400", "body.parameters.num_steps"),
        ("default", {"priority": 1}, "400", "body.parameters.priority: Unknown field"),
        ("default", {"timeout": 1000}, "400", "body.parameters.timeout: Unknown field"),
        ("default", {"sequence_id": 1}, "400", "body.parameters.sequence_id"),
        ("default", {"outputs": [triton.InferRequestedOutput("logits")]}, "400", "body.outputs.0.name"),
        (
            "default",
            {"outputs": [triton.InferRequestedOutput("image", class_count=3)]},
            "400",
            "body.outputs.0.parameters.classification",
        ),
        ("default", {"request_compression_algorithm": "gzip"}, "400", "Compressed bodies are not supported"),
        ("fast", {"parameters": {"num_steps": 3}}, "400", "num_steps: Input should be"),
    ],
)
def test_triton_raises_the_error_of_the_service(
    client: triton.InferenceServerClient, model: str, fields: dict[str, Any], status: str, message: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs_of(), **({"headers": key_header()} | fields))
    assert caught.value.status() == status
    assert message in caught.value.message()


def test_triton_raises_an_error_for_wrong_tensors(client: triton.InferenceServerClient) -> None:
    wrong = triton.InferInput("digit", [1], "INT32")
    wrong.set_data_from_numpy(np.array([1], dtype=np.int32))
    matrix = triton.InferInput("digit", [1, 2], "INT64")
    matrix.set_data_from_numpy(np.array([[1, 2]], dtype=np.int64))
    for tensors, message in (
        ([wrong], "Input should be 'INT64'"),
        ([matrix], "body.inputs.0.shape"),
        ([input_of("seed", [1], is_binary=True)], "The input 'digit' is required"),
        ([input_of("digit", [1], is_binary=True)] * 2, "'digit' occurs more than once"),
        ([input_of("digit", [10], is_binary=True)], "Input should be from 0 to 9"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            client.infer("default", tensors, headers=key_header())


# KServe's client


@pytest.fixture(scope="module")
def kserve_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns an interpreter with the package kserve: that of the variable KSERVE_PYTHON, or a new environment.

    The package needs its own environment, because it restricts the versions of packages of this project.
    """
    if KSERVE_PYTHON in os.environ:
        return os.environ[KSERVE_PYTHON]
    folder = tmp_path_factory.mktemp("kserve")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", KSERVE], check=True)
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kserve_client_gets_the_pixels_of_generate(
    kserve_python: str, protected: Service, expected: npt.NDArray[np.uint8], tmp_path: Path
) -> None:
    done = subprocess.run(
        [kserve_python, KSERVE_CLIENT, protected.url, KEY], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert [answers[name] for name in ("live", "ready", "model_ready", "other_model_ready")] == [True] * 3 + [False]
    for name in ("json", "binary", "mixed"):
        outputs = answers[name]["outputs"]
        assert np.array_equal(outputs["image"], expected), name
        assert outputs["seed"] == SEEDS
        assert answers[name]["model_name"] == "default"
    assert answers["json"]["id"] == "42"
    assert list(answers["mixed"]["outputs"]) == ["seed", "image"]
    assert answers["no_key"]["status"] == 401
    assert "An API key is required" in answers["no_key"]["message"]
    assert answers["invalid"]["status"] == 400
    assert "body.parameters.num_steps" in answers["invalid"]["message"]


# The document of the protocol


def document_without_versions() -> dict[str, Any]:
    """Returns the OpenAPI document of the protocol, adapted in three respects.

    The service has no versions of models. The text of the protocol makes the version optional, but the document has
    only the paths with a version. The document has `${MODEL_NAME}`, which OpenAPI reads as a `$` before the parameter.
    It has the path `/v2/`, but the text of the protocol has `v2`, and both clients request `/v2`.
    """
    document: dict[str, Any] = yaml.safe_load(PROTOCOL.read_text())
    paths = {}
    for path, operations in document["paths"].items():
        path = path.replace("/versions/${MODEL_VERSION}", "").replace("${", "{").rstrip("/")
        parameters = [each for each in operations.pop("parameters", []) if each["name"] != "MODEL_VERSION"]
        paths[path] = {**operations, "parameters": parameters}
    return {**document, "paths": paths}


def test_responses_conform_to_the_document_of_the_protocol(service: Service, tmp_path: Path) -> None:
    document = document_without_versions()
    assert {path.replace("MODEL_NAME", "name") for path in document["paths"]} == {
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/infer",
    }
    before, file = service.metrics(), tmp_path / "protocol.json"
    file.write_text(json.dumps(document))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        *(
            sys.executable,
            "-m",
            "schemathesis.cli",
            f"--config-file={CONFIG}",
            "run",
            str(file),
            f"--url={service.url}",
        ),
        *("--mode=positive", "--phases=examples,coverage,fuzzing", f"--checks={checks}", "--max-examples=50"),
        *("--seed=1", "--generation-database=none", "--continue-on-failure", "--suppress-health-check=all"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for the hooks
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout
    after = service.metrics()
    for code in ("200", "400"):
        labels = {"route": "/v2/models/{name}/infer", "code": code}
        assert after.value("requests_total", **labels) - before.value("requests_total", **labels) >= 10
    service.wait_until_idle()


# Life cycle


def work(service: Service, number: int = 32) -> httpx.Response:
    """Sends a request that takes many steps with one row per step."""
    with httpx.Client(base_url=service.url, timeout=TIMEOUT) as client:
        return client.post(INFER, json=body_of([1] * number))


def test_disconnect_drain_and_refusal_of_the_infer_route(start: Start) -> None:
    service = start(UNFOG_MAX_BATCH="1", UNFOG_REQUEST_TIMEOUT="600", UNFOG_DRAIN_TIMEOUT="1000")
    content = json.dumps(body_of([1] * 32)).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with socket.create_connection(service.address, timeout=TIMEOUT) as connection:
        connection.sendall(head + content)
        service.wait_until_running()
    service.wait_until_idle()  # the disconnect has cancelled all images
    assert service.metrics().value("requests_total", route="/v2/models/{name}/infer", code="499") == 1

    late = service.client.post(INFER, json=body_of([1] * 32, parameters={"timeout_seconds": 0.001}))
    assert late.status_code in (429, 504)
    assert list(late.json()) == ["error"]

    with ThreadPoolExecutor() as pool:
        admitted = pool.submit(work, service, 4)
        service.wait_until_running()
        service.process.signal(signal.SIGTERM)
        wait_until(lambda: service.client.get("/v2/health/ready").status_code == 503, "the service is not ready")
        assert service.client.get("/v2/health/live").status_code == 200
        assert service.client.get("/v2/models/default/ready").json() == {"name": "default", "ready": False}
        refused = service.client.post(INFER, json=body_of([1]))
        assert refused.status_code == 503
        assert refused.json() == {
            "error": f"The service is shutting down. Retry after {refused.headers['retry-after']} s"
        }
        assert admitted.result(TIMEOUT).status_code == 200
    assert service.process.wait() == 0
