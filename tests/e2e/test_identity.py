"""The same request gives the same bytes: alone, in any company, at any batch size, in any process."""

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
from tests.e2e.service import Service, open_png

# Every kind of path: the samplers, few steps and many, guidance off, recommended and strong.
ASKED: dict[str, dict[str, Any]] = {
    "default": {"digit": 7, "seed": 1},
    "many": {"digit": 3, "seed": 1, "count": 5, "num_steps": 37, "guidance_scale": 3},
    "unguided": {"digit": 0, "seed": 2**53 - 1, "num_steps": 20, "sampler": "ddim", "guidance_scale": 1},
    "strong": {"digit": 9, "seed": 0, "num_steps": 50, "sampler": "ddim", "guidance_scale": 10},
    "solver": {"digit": 5, "seed": 12345, "count": 3, "num_steps": 9, "sampler": "dpmpp", "guidance_scale": 1.5},
    "one step": {"digit": 1, "seed": 8, "num_steps": 1, "sampler": "dpmpp"},
}
ENOUGH_ROWS = 16


@pytest.fixture(scope="module")
def exact(service: Service, checkpoint: Path) -> Iterator[Service]:
    """A service that computes in float32, the precision that every machine has."""
    if _dtype(service) == "float32":
        yield service
        return
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_DTYPE="float32")


def draw_alone(service: Service) -> dict[str, list[bytes]]:
    """What is asked for, one request after the other."""
    service.wait_until_idle()
    return {name: service.images(**body) for name, body in ASKED.items()}


@pytest.fixture(scope="module")
def alone(service: Service) -> dict[str, list[bytes]]:
    """In the precision that is chosen here."""
    return draw_alone(service)


@pytest.fixture(scope="module")
def alone_exact(exact: Service) -> dict[str, list[bytes]]:
    """In float32."""
    return draw_alone(exact)


def test_bytes_are_the_same_in_the_company_of_hundreds(service: Service, alone: dict[str, list[bytes]]) -> None:
    in_company, num_others, mean_rows = draw_in_company(service, num_others=320, steps=(15, 35))
    assert num_others >= 300
    assert mean_rows >= ENOUGH_ROWS
    assert in_company == alone


def test_float32_bytes_are_the_same_in_company(exact: Service, alone_exact: dict[str, list[bytes]]) -> None:
    assert draw_in_company(exact, num_others=100, steps=(15, 35))[0] == alone_exact


@pytest.mark.parametrize("max_batch", [1, 7])
def test_bytes_are_the_same_at_another_batch_size_and_after_a_restart(
    alone: dict[str, list[bytes]], start: Start, max_batch: int
) -> None:
    narrow = start(UNFOG_MAX_BATCH=str(max_batch))
    assert draw_in_company(narrow, num_others=20, steps=(1, 10))[0] == alone


def test_another_count_leaves_the_images_that_both_have(service: Service, alone: dict[str, list[bytes]]) -> None:
    assert service.images(**{**ASKED["many"], "count": 2}) == alone["many"][:2]
    assert service.images(**{**ASKED["unguided"], "count": 64})[:1] == alone["unguided"]


@pytest.mark.parametrize(
    "change",
    [{"digit": 4}, {"seed": 2}, {"num_steps": 36}, {"sampler": "ddim"}, {"guidance_scale": 3.5}],
    ids=lambda change: next(iter(change)),
)
def test_another_option_is_another_image(
    service: Service, alone: dict[str, list[bytes]], change: dict[str, Any]
) -> None:
    for one, other in zip(service.images(**{**ASKED["many"], **change}), alone["many"], strict=True):
        assert (open_png(one)[0] != open_png(other)[0]).any()


@pytest.mark.parametrize("name", ASKED)
def test_images_are_those_of_the_models_own_sampler(
    alone_exact: dict[str, list[bytes]], checkpoint: Path, name: str
) -> None:
    """Drawn here one by one, in float32, by the loop of the paper."""
    body = {"count": 1, "num_steps": 100, "sampler": "ddpm", "guidance_scale": GUIDANCE.scale, **ASKED[name]}
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
    drawn = np.stack([open_png(png)[0] for png in alone_exact[name]]).astype(float)
    assert (np.abs(drawn - expected) <= 1).mean() > 0.99


def draw_in_company(
    service: Service, num_others: int, steps: tuple[int, int]
) -> tuple[dict[str, list[bytes]], int, float]:
    """What is asked for, sent among `num_others` other images of every kind; how many they were; mean rows a step."""
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
    with ThreadPoolExecutor(len(others) + len(ASKED)) as pool:
        first = [pool.submit(service.images, **body) for body in others[::2]]
        asked = {name: pool.submit(service.images, **body) for name, body in ASKED.items()}
        last = [pool.submit(service.images, **body) for body in others[1::2]]
        drawn = {name: answer.result() for name, answer in asked.items()}
        num_drawn = sum(len(answer.result()) for answer in first + last)
    return drawn, num_drawn, service.mean_rows_since(before)


def _dtype(service: Service) -> str:
    return str(service.client.get("/health").json()["dtype"])
