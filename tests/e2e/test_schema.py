"""Requests made from the API's own document, good ones and bad ones, against the running service."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.e2e.conftest import start_service
from tests.e2e.service import Service

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.fixture(scope="module")
def described(checkpoint: Path, fast_checkpoint: Path) -> Iterator[Service]:
    """Two models that permit different requests, of which the largest is small: hundreds of them are asked for."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_FAST_CHECKPOINT=str(fast_checkpoint),
            UNFOG_MAX_BATCH="64",
            UNFOG_REQUEST_TIMEOUT="300",
            UNFOG_MAX_COUNT="4",
        )


@pytest.fixture(scope="module")
def document(described: Service) -> dict[str, Any]:
    """What it says of itself."""
    served: dict[str, Any] = described.client.get("/openapi.json").json()
    return served


def is_valid(document: dict[str, Any], schema: str, instance: Any) -> bool:
    """Whether the instance is valid by one of the document's schemas."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    return bool(Draft202012Validator(whole).is_valid(instance))


def run_schemathesis(service: Service, examples: int, folder: Path) -> None:
    """All of its checks, in a folder for what it leaves; what it finds is in the message."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", f"--config-file={CONFIG}", "run", f"{service.url}/openapi.json"),
        *("--mode=all", "--phases=examples,coverage,fuzzing", "--checks=all", f"--max-examples={examples}"),
        *("--seed=1", "--generation-database=none", "--continue-on-failure", "--suppress-health-check=all"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout
    assert not [line for line in service.process.lines if '"level": "error"' in line]
    service.wait_until_idle()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_steps": 1},
        {"num_steps": 2},
        {"num_steps": 4.0},
        {"sampler": "ddpm", "num_steps": 4},
        {"sampler": "ddim", "num_steps": 4},
        {"guidance_scale": 1, "num_steps": 4},
        {"guidance_scale": 1.5, "num_steps": 4},
        {"digit": 10},
        {"count": 5},
        {"timeout_seconds": 301},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["default", "fast", "slow"])
def test_request_is_accepted_if_and_only_if_the_document_permits_it(
    described: Service, document: dict[str, Any], model: str, fields: dict[str, Any]
) -> None:
    body = {"digit": 7, "model": model, **fields}
    status = 200 if is_valid(document, "GenerateRequest", body) else 422
    assert described.post(body).status_code == status


def test_fast_model_permits_less_than_the_default_one(document: dict[str, Any]) -> None:
    body = {"digit": 7, "num_steps": 1}
    assert is_valid(document, "GenerateRequest", body)
    assert not is_valid(document, "GenerateRequest", {**body, "model": "fast"})


def test_every_example_of_a_request_is_answered(described: Service, document: dict[str, Any]) -> None:
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    examples = [example["value"] for example in content["examples"].values()]
    assert {"digit": 7, "model": "fast"} in examples
    for body in examples:
        answer = described.post(body)
        assert answer.status_code == 200, answer.text
        assert is_valid(document, "GenerateResponse", answer.json())


def test_events_of_a_stream_are_as_described(described: Service, document: dict[str, Any]) -> None:
    with described.events({"digit": 7, "count": 2, "num_steps": 10}) as stream:
        events = list(stream)
    with described.events({"digit": 7, "count": 4, "timeout_seconds": 0.001}) as stream:
        events += list(stream)
    names = {"accepted", "progress", "image", "done", "error"}
    assert {name for name, _ in events} >= names - {"error"}
    assert events[-1][0] == "error"
    data_schema = {
        schema["properties"]["event"]["const"]: schema["properties"]["data"]["contentSchema"]["$ref"].split("/")[-1]
        for schema in document["components"]["schemas"]["StreamEvent"]["oneOf"]
    }
    assert set(data_schema) == names
    for name, data in events:
        assert is_valid(document, "StreamEvent", {"event": name, "data": json.dumps(data)})
        assert is_valid(document, data_schema[name], data)
        assert set(data) <= set(document["components"]["schemas"][data_schema[name]]["properties"])


def test_the_service_is_what_its_document_says(described: Service, tmp_path: Path) -> None:
    run_schemathesis(described, 25, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_service_is_what_its_document_says_a_thousand_times(described: Service, tmp_path: Path) -> None:
    run_schemathesis(described, 1000, tmp_path)
