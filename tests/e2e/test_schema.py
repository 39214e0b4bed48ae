"""Valid and invalid requests generated from the OpenAPI document, sent to a running service."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.e2e.conftest import start_service
from tests.e2e.process import ROOT, TIMEOUT
from tests.e2e.service import Service

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.fixture(scope="module")
def service_with_two_models(checkpoint: Path, fast_checkpoint: Path) -> Iterator[Service]:
    """A service with two models that permit different requests, and a small maximum count to save time."""
    with ExitStack() as stack:
        yield start_service(
            stack,
            checkpoint,
            UNFOG_FAST_CHECKPOINT=str(fast_checkpoint),
            UNFOG_MAX_BATCH="64",
            UNFOG_REQUEST_TIMEOUT="300",
            UNFOG_MAX_COUNT="4",
            UNFOG_CLIP="auto",
            UNFOG_MAX_BODY_BYTES="65536",  # enough for a prompt that is longer than the schema permits
        )


@pytest.fixture(scope="module")
def document(service_with_two_models: Service) -> dict[str, Any]:
    """Returns the OpenAPI document that the service serves."""
    served: dict[str, Any] = service_with_two_models.client.get("/openapi.json").json()
    return served


def is_valid(document: dict[str, Any], schema: str, instance: Any) -> bool:
    """Validates the instance with a schema of the OpenAPI document."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    return bool(Draft202012Validator(whole).is_valid(instance))


def run_schemathesis(service: Service, examples: int, folder: Path) -> None:
    """Runs all checks of schemathesis with `folder` as current folder. Fails with its output if it finds a problem."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", f"--config-file={CONFIG}", "run", f"{service.url}/openapi.json"),
        *("--mode=all", "--phases=examples,coverage,fuzzing", "--checks=all", f"--max-examples={examples}"),
        *("--seed=1", "--generation-database=none", "--continue-on-failure", "--suppress-health-check=all"),
        # The default limits are too short for a busy machine.
        *(f"--request-timeout={TIMEOUT}", f"--max-response-time={TIMEOUT}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for the hooks
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
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
def test_request_is_accepted_if_and_only_if_the_schema_permits_it(
    service_with_two_models: Service, document: dict[str, Any], model: str, fields: dict[str, Any]
) -> None:
    body = {"digit": 7, "model": model, **fields}
    status = 200 if is_valid(document, "GenerateRequest", body) else 422
    assert service_with_two_models.post(body).status_code == status


def test_schema_of_the_fast_model_is_stricter_than_of_the_default_model(document: dict[str, Any]) -> None:
    body = {"digit": 7, "num_steps": 1}
    assert is_valid(document, "GenerateRequest", body)
    assert not is_valid(document, "GenerateRequest", {**body, "model": "fast"})


def test_every_request_example_succeeds(service_with_two_models: Service, document: dict[str, Any]) -> None:
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    examples = [example["value"] for example in content["examples"].values()]
    assert {"digit": 7, "model": "fast"} in examples
    for body in examples:
        response = service_with_two_models.post(body)
        assert response.status_code == 200, response.text
        assert is_valid(document, "GenerateResponse", response.json())


def test_stream_events_match_their_schemas(service_with_two_models: Service, document: dict[str, Any]) -> None:
    with service_with_two_models.events({"digit": 7, "count": 2, "num_steps": 10}) as stream:
        events = list(stream)
    with service_with_two_models.events({"digit": 7, "count": 4, "timeout_seconds": 0.001}) as stream:
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


def test_schemathesis_finds_no_problem_with_5_examples(service_with_two_models: Service, tmp_path: Path) -> None:
    run_schemathesis(service_with_two_models, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_no_problem_with_1000_examples(service_with_two_models: Service, tmp_path: Path) -> None:
    run_schemathesis(service_with_two_models, 1000, tmp_path)
