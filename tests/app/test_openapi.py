import json
import re
from pathlib import Path
from typing import Any

from app.config import Settings
from app.main import create_app

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"


def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def references(node: Any) -> set[str]:
    """Every $ref below a node."""
    if isinstance(node, dict):
        found = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return found.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_committed_document_is_the_one_that_is_served() -> None:
    assert json.loads(COMMITTED.read_text()) == document(), "run python -m app --openapi > docs/openapi.json"


def test_every_reference_leads_somewhere() -> None:
    served = document()
    assert references(served) <= {f"#/components/schemas/{name}" for name in served["components"]["schemas"]}


def test_every_route_is_described() -> None:
    assert set(document()["paths"]) == {"/generate", "/health", "/livez", "/readyz", "/startupz", "/metrics"}


def test_the_body_and_the_answers_of_generate_are_described() -> None:
    served = document()
    generate = served["paths"]["/generate"]["post"]
    body = generate["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/GenerateRequest"}
    fields = served["components"]["schemas"]["GenerateRequest"]["properties"]
    assert set(fields) == {
        "digit",
        "count",
        "seed",
        "num_steps",
        "sampler",
        "guidance_scale",
        "scale",
        "model",
        "timeout_seconds",
    }
    refused = {"400", "401", "403", "406", "408", "413", "415", "422", "429"}
    assert set(generate["responses"]) == refused | {"200", "500", "503", "504"}
    assert generate["security"] == [{}, {"bearer": []}, {"header": []}]  # none is needed unless keys are set
    assert set(generate["responses"]["200"]["content"]) == {
        "application/json",
        "image/png",
        "application/zip",
        "text/event-stream",
    }


def test_same_bytes_are_promised_on_a_cpu_only() -> None:
    served = document()
    texts = [
        served["paths"]["/generate"]["post"]["description"],
        served["components"]["schemas"]["GenerateRequest"]["description"],
    ]
    for text in (served["info"]["summary"], *texts):
        assert re.search(r"On a CPU [^.]* the same bytes under any load\.", text)
    for text in texts:
        assert "On a GPU such images may differ in the last bits" in text
    assert len(re.findall("same bytes", json.dumps(served))) == 3
