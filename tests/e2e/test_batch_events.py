"""GET /models and GET /events/batch of a running service."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.e2e.conftest import Start
from tests.e2e.process import TIMEOUT
from tests.e2e.service import Service, read_events

Events = Iterator[tuple[str, dict[str, Any]]]


@contextmanager
def watch(service: Service) -> Iterator[Events]:
    """Opens the stream of batches. Leaving the context closes the connection."""
    with (
        httpx.Client(base_url=service.url, timeout=TIMEOUT) as client,
        client.stream("GET", "/events/batch") as response,
    ):
        assert response.status_code == 200, response.read()
        yield read_events(response)


def test_running_images_are_seen_until_the_service_is_idle(service: Service) -> None:
    service.wait_until_idle()
    with watch(service) as batches, service.events({"digit": 1, "count": 64}) as images:
        seen = [next(batches)[1]]
        assert seen[0]["rows"] == []
        assert next(images)[0] == "accepted"
        while not seen[-1]["rows"]:
            seen.append(next(batches)[1])
        (done,) = [data for name, data in images if name == "done"]
        while seen[-1]["rows"]:
            seen.append(next(batches)[1])
    steps = [batch["step"] for batch in seen]
    assert steps[:-1] == sorted(set(steps[:-1]))
    assert steps[-2] <= steps[-1]  # The last step runs in one event, and the service is idle in the next one.
    rows = [row for batch in seen for row in batch["rows"]]
    assert {row["index"] for row in rows} <= set(range(64))
    assert len({row["job"] for row in rows}) == 1
    assert {(row["of"], row["model"], row["sampler"]) for row in rows} == {(100, "default", "ddpm")}
    # Guidance acts at t = 20 to 80, and the timestep of step k is 100 - k.
    assert all(row["guided"] == (20 <= 100 - row["step"] <= 80) for row in rows)
    assert all(row["evaluations"] in (0, 1 + row["guided"]) for row in rows)
    assert done["evaluations"] == 100 + 61
    service.wait_until_idle()


def test_viewer_does_not_delay_the_exit_and_is_told_that_the_service_drains(start: Start) -> None:
    service = start()
    with watch(service) as batches:
        assert next(batches)[0] == "batch"
        service.process.signal(signal.SIGTERM)
        name, data = list(batches)[-1]
    assert (name, data["code"]) == ("error", "draining")
    assert service.process.wait() == 0
    assert not [line for line in service.process.lines if '"level": "error"' in line or "Traceback" in line]


def test_closed_connection_is_logged_as_a_client_that_left(service: Service) -> None:
    before = service.metrics()
    with watch(service) as batches:
        next(batches)
    labels = {"route": "/events/batch", "code": "200"}
    service.wait_for(before.value("requests_total", **labels) + 1, "requests_total", **labels)
    lines = [line for line in service.process.lines if '"/events/batch"' in line]
    assert '"outcome": "client_gone"' in lines[-1]


def test_models_of_a_checkpoint_without_training_facts_are_listed(service: Service) -> None:
    (model,) = service.client.get("/models").json()["models"]
    assert model["sha256"] == service.client.get("/health").json()["model"]["sha256"]
    assert (model["training"], model["has_picture_tasks"]) == ({"evaluations": []}, True)
    assert model["guidance_interval"] == {"ddpm": [20, 80], "ddim": [20, 80], "dpmpp": [20, 80]}
