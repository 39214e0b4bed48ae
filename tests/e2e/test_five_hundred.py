"""Five hundred images of every kind, each in a step of its own, then all in random company: the same bytes."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from model.checkpoint import SHIPPED
from model.precision import can_compile
from tests.e2e.conftest import Start, start_service
from tests.e2e.service import Service

NUM_IMAGES, CLIENTS, ENOUGH_ROWS = 500, 64, 16
PATIENCE = 600  # seconds
THREADS_VARY = {"OMP_NUM_THREADS": "2", "UNFOG_NUM_THREADS": ""}  # with the load
COMPANIES = (  # and the mean rows a step that they must have
    ({**THREADS_VARY, "UNFOG_MAX_BATCH": "auto"}, 2),  # few where the start met a busy machine
    ({**THREADS_VARY, "UNFOG_MAX_BATCH": "64"}, ENOUGH_ROWS),
    ({"UNFOG_MAX_BATCH": "23", "UNFOG_NUM_THREADS": "2"}, ENOUGH_ROWS),
)
Body = dict[str, Any]


def requests(steps: tuple[int, int], models: tuple[str, ...]) -> list[Body]:
    """Of one image each, no two the same."""
    choose = random.Random(4)
    return [
        {
            "digit": choose.randrange(10),
            "seed": seed,
            "num_steps": choose.randint(*steps),
            "sampler": choose.choice(["ddpm", "ddim", "dpmpp"]),
            "guidance_scale": choose.choice([1, 1.5, 3]),
        }
        if choose.choice(models) == "default"
        else {"digit": choose.randrange(10), "seed": seed, "model": "fast"}
        for seed in range(NUM_IMAGES)
    ]


def drawn(service: Service, asked: list[Body], order: int) -> tuple[list[bytes], float]:
    """The images of all, asked for in an order of its own; mean rows a step."""
    places = random.Random(order).sample(range(len(asked)), len(asked))
    service.client.timeout = PATIENCE  # one row a step, a busy machine: the last of the clients waits long
    service.wait_until_idle()
    before = service.metrics()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = dict(zip(places, pool.map(lambda place: service.images(**asked[place]), places), strict=True))
    return [answers[place][0] for place in range(len(asked))], service.mean_rows_since(before)


def same(one: list[bytes], other: list[bytes]) -> int:
    """How many are."""
    return sum(a == b for a, b in zip(one, other, strict=True))


def test_five_hundred_of_five_hundred_are_the_same_in_random_company(start: Start) -> None:
    asked = requests(steps=(5, 20), models=("default",))
    alone, rows = drawn(start(UNFOG_MAX_BATCH="1", UNFOG_REQUEST_TIMEOUT=str(PATIENCE)), asked, order=0)
    assert rows == 1
    assert len(set(alone)) == NUM_IMAGES
    in_company, rows = drawn(start(UNFOG_REQUEST_TIMEOUT=str(PATIENCE), UNFOG_MAX_BATCH="64"), asked, order=1)
    assert rows >= ENOUGH_ROWS
    assert same(in_company, alone) == NUM_IMAGES


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compile_", ["on", "off"])
def test_so_are_those_of_the_models_that_ship(compile_: str) -> None:
    if compile_ == "on" and not can_compile():
        pytest.skip("needs a C++ compiler")
    asked = requests(steps=(20, 100), models=("default", "default", "default", "fast"))
    with ExitStack() as stack:

        def service(**variables: str) -> Service:
            return start_service(
                stack, SHIPPED, UNFOG_COMPILE=compile_, UNFOG_REQUEST_TIMEOUT=str(PATIENCE), **variables
            )

        alone, rows = drawn(service(UNFOG_MAX_BATCH="1", UNFOG_NUM_THREADS="1"), asked, order=0)
        assert rows == 1
        assert len(set(alone)) == NUM_IMAGES
        for order, (variables, enough_rows) in enumerate(COMPANIES, start=1):
            in_company, rows = drawn(service(**variables), asked, order)
            assert rows >= enough_rows
            assert same(in_company, alone) == NUM_IMAGES
