"""The same request gives the same bytes: alone, in any batch, at any batch size and in any process."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load
from model.sampler import Guidance, sample
from tests.e2e.conftest import GUIDANCE, Start, start_service
from tests.e2e.service import GIF, WEBP, Service, open_png

# These requests cover all samplers, few and many steps, and guidance that is off, recommended or strong.
REQUESTS: dict[str, dict[str, Any]] = {
    "default": {"digit": 7, "seed": 1},
    "several images": {"digit": 3, "seed": 1, "count": 5, "num_steps": 37, "guidance_scale": 3},
    "unguided": {"digit": 0, "seed": 2**53 - 1, "num_steps": 20, "sampler": "ddim", "guidance_scale": 1},
    "strong guidance": {"digit": 9, "seed": 0, "num_steps": 50, "sampler": "ddim", "guidance_scale": 10},
    "solver": {"digit": 5, "seed": 12345, "count": 3, "num_steps": 9, "sampler": "dpmpp", "guidance_scale": 1.5},
    "one step": {"digit": 1, "seed": 8, "num_steps": 1, "sampler": "dpmpp"},
}
ENOUGH_ROWS = 16


@pytest.fixture(scope="module")
def float32_service(service: Service, checkpoint: Path) -> Iterator[Service]:
    """A service that computes in float32, which every machine supports."""
    if _dtype(service) == "float32":
        yield service
        return
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_DTYPE="float32")


def generate_alone(service: Service) -> dict[str, list[bytes]]:
    """Sends REQUESTS one after the other and returns their images."""
    service.wait_until_idle()
    return {name: service.images(**body) for name, body in REQUESTS.items()}


@pytest.fixture(scope="module")
def alone(service: Service) -> dict[str, list[bytes]]:
    """Returns the images of REQUESTS in the default dtype of this machine."""
    return generate_alone(service)


@pytest.fixture(scope="module")
def alone_float32(float32_service: Service) -> dict[str, list[bytes]]:
    """Returns the images of REQUESTS in float32."""
    return generate_alone(float32_service)


def test_bytes_are_the_same_in_a_batch_with_hundreds_of_images(service: Service, alone: dict[str, list[bytes]]) -> None:
    batched, num_others, mean_rows = generate_batched(service, num_others=320, steps=(15, 35))
    assert num_others >= 300
    assert mean_rows >= ENOUGH_ROWS
    assert batched == alone


def test_float32_bytes_are_the_same_in_a_batch(float32_service: Service, alone_float32: dict[str, list[bytes]]) -> None:
    assert generate_batched(float32_service, num_others=100, steps=(15, 35))[0] == alone_float32


@pytest.mark.parametrize("max_batch", [1, 7])
def test_bytes_do_not_depend_on_batch_size_or_restart(
    alone: dict[str, list[bytes]], start: Start, max_batch: int
) -> None:
    restarted = start(UNFOG_MAX_BATCH=str(max_batch))
    assert generate_batched(restarted, num_others=20, steps=(1, 10))[0] == alone


@pytest.mark.parametrize("accept", [WEBP, GIF])
def test_animations_do_not_depend_on_the_load(service: Service, start: Start, accept: str) -> None:
    """With three rows a step, some images of a request wait while others run."""
    asked = [(REQUESTS[name], accept, "?previews=20") for name in ("several images", "solver", "one step")]
    service.wait_until_idle()
    alone = [service.post(*each).content for each in asked]
    loaded = start(UNFOG_MAX_BATCH="3")
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(loaded.images, digit=digit, count=4, num_steps=9 + digit) for digit in range(6)]
        animations = [pool.submit(loaded.post, *each) for each in asked]
        assert [animation.result().content for animation in animations] == alone
        for other in others:
            other.result()


def test_count_does_not_change_the_images_with_the_same_index(service: Service, alone: dict[str, list[bytes]]) -> None:
    assert service.images(**{**REQUESTS["several images"], "count": 2}) == alone["several images"][:2]
    assert service.images(**{**REQUESTS["unguided"], "count": 64})[:1] == alone["unguided"]


@pytest.mark.parametrize(
    "change",
    [{"digit": 4}, {"seed": 2}, {"num_steps": 36}, {"sampler": "ddim"}, {"guidance_scale": 3.5}],
    ids=lambda change: next(iter(change)),
)
def test_any_other_option_changes_every_image(
    service: Service, alone: dict[str, list[bytes]], change: dict[str, Any]
) -> None:
    for one, other in zip(
        service.images(**{**REQUESTS["several images"], **change}), alone["several images"], strict=True
    ):
        assert (open_png(one)[0] != open_png(other)[0]).any()


@pytest.mark.parametrize("name", REQUESTS)
def test_images_match_the_sampler_of_the_model_package(
    alone_float32: dict[str, list[bytes]], checkpoint: Path, name: str
) -> None:
    """The expected images are generated in float32 by `model.sampler.sample`."""
    body = {"count": 1, "num_steps": 100, "sampler": "ddpm", "guidance_scale": GUIDANCE.scale, **REQUESTS[name]}
    loaded, count = load(checkpoint), body["count"]
    x_0 = sample(
        loaded.network,
        loaded.schedule,
        torch.full((count,), body["digit"]),
        seed=torch.full((count,), body["seed"]),
        index=torch.arange(count),
        image_shape=loaded.image_shape,
        sampler=body["sampler"],
        num_steps=body["num_steps"],
        guidance=Guidance(body["guidance_scale"], GUIDANCE.start, GUIDANCE.stop),
        null_label=loaded.network.null_label,
    )
    expected = ((x_0[:, 0] + 1) * 127.5).numpy()
    generated = np.stack([open_png(png)[0] for png in alone_float32[name]]).astype(float)
    assert (np.abs(generated - expected) <= 1).mean() > 0.99


def generate_batched(
    service: Service, num_others: int, steps: tuple[int, int]
) -> tuple[dict[str, list[bytes]], int, float]:
    """Sends REQUESTS together with at least `num_others` random images.

    Returns the images of REQUESTS, the number of other images and the mean rows per step.
    """
    choose = random.Random(7)
    others: list[dict[str, Any]] = []
    while sum(body["count"] for body in others) < num_others:
        others.append(
            {
                "digit": choose.randrange(10),
                "count": choose.randint(1, 16),
                "num_steps": choose.randint(*steps),
                "sampler": choose.choice(["ddpm", "ddim", "dpmpp"]),
                "guidance_scale": choose.choice([1, 1.5, 2, 7.25]),
            }
        )
    service.wait_until_idle()
    before = service.metrics()
    with ThreadPoolExecutor(len(others) + len(REQUESTS)) as pool:
        first = [pool.submit(service.images, **body) for body in others[::2]]
        pending = {name: pool.submit(service.images, **body) for name, body in REQUESTS.items()}
        last = [pool.submit(service.images, **body) for body in others[1::2]]
        generated = {name: response.result() for name, response in pending.items()}
        num_generated = sum(len(response.result()) for response in first + last)
    return generated, num_generated, service.mean_rows_since(before)


def _dtype(service: Service) -> str:
    return str(service.client.get("/health").json()["dtype"])
