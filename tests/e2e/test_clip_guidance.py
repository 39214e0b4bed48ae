"""Tests of CLIP guidance in a running service: the bytes of images, alone and together with other requests."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Start, start_service
from tests.e2e.service import JSON, PNG, Service

pytest.importorskip("open_clip")

GUIDED: dict[str, dict[str, Any]] = {
    "default prompt": {"digit": 7, "seed": 1, "num_steps": 20, "clip_guidance_scale": 1},
    "several images": {
        "digit": 3,
        "seed": 1,
        "count": 11,
        "num_steps": 12,
        "clip_guidance_scale": 2.5,
        "clip_prompt": "a slanted three",
    },
    "solver": {
        "digit": 5,
        "seed": 3,
        "num_steps": 9,
        "sampler": "dpmpp",
        "guidance_scale": 1,
        "clip_guidance_scale": 1,
    },
}
PLAIN: dict[str, Any] = {"digit": 4, "seed": 2**53 - 1, "count": 5, "num_steps": 10}


@pytest.fixture(scope="module")
def service_with_clip(checkpoint: Path) -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_CLIP="auto", UNFOG_REQUEST_TIMEOUT="600")


@pytest.fixture(scope="module")
def alone(service_with_clip: Service) -> dict[str, list[bytes]]:
    return {name: service_with_clip.images(**body) for name, body in GUIDED.items()}


@pytest.fixture(scope="module")
def batched(service_with_clip: Service) -> tuple[dict[str, list[bytes]], list[bytes]]:
    return together(service_with_clip, num_others=8)


def together(service: Service, num_others: int) -> tuple[dict[str, list[bytes]], list[bytes]]:
    """Sends the guided requests, other guided requests and requests without CLIP guidance at the same time.

    Returns the images of the guided requests, and those of PLAIN.
    """
    others = [
        {**PLAIN, "seed": seed, "clip_guidance_scale": seed % 2, "count": 1 + seed % 5} for seed in range(num_others)
    ]
    with ThreadPoolExecutor(32) as pool:
        pending = [pool.submit(service.images, **body) for body in others]
        guided = {name: pool.submit(service.images, **body) for name, body in GUIDED.items()}
        plain = pool.submit(service.images, **PLAIN)
        for each in pending:
            each.result()
        return {name: images.result() for name, images in guided.items()}, plain.result()


def test_guided_images_have_the_same_bytes_alone_and_with_other_requests(
    batched: tuple[dict[str, list[bytes]], list[bytes]], alone: dict[str, list[bytes]]
) -> None:
    assert batched[0] == alone


def test_guided_images_do_not_depend_on_batch_size_or_restart(alone: dict[str, list[bytes]], start: Start) -> None:
    restarted = start(UNFOG_MAX_BATCH="1", UNFOG_CLIP="embedded", UNFOG_REQUEST_TIMEOUT="600")
    assert together(restarted, num_others=2)[0] == alone


def test_images_without_clip_guidance_equal_those_of_a_service_without_clip(
    batched: tuple[dict[str, list[bytes]], list[bytes]], service: Service
) -> None:
    assert batched[1] == service.images(**PLAIN)


@pytest.mark.parametrize("change", [{"clip_guidance_scale": 2}, {"clip_prompt": "a thin seven"}], ids=str)
def test_scale_and_prompt_change_the_image(
    service_with_clip: Service, alone: dict[str, list[bytes]], change: dict[str, Any]
) -> None:
    assert service_with_clip.images(**{**GUIDED["default prompt"], **change}) != alone["default prompt"]


@pytest.mark.parametrize("name", GUIDED)
def test_guided_picture_is_reproduced_with_the_same_bytes(service_with_clip: Service, name: str) -> None:
    png = service_with_clip.post(GUIDED[name], PNG).content
    again = service_with_clip.client.post("/reproduce", files={"image": png}, headers={"accept": PNG})
    assert (again.status_code, again.headers["x-identical"]) == (200, "true")
    assert again.content == png


def test_picture_with_clip_guidance_is_refused_by_a_service_without_clip(
    service_with_clip: Service, service: Service
) -> None:
    png = service_with_clip.post(GUIDED["default prompt"], PNG).content
    refused = service.client.post("/reproduce", files={"image": png}, headers={"accept": JSON})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_image")
    assert "This service has no CLIP model" in refused.json()["detail"]
