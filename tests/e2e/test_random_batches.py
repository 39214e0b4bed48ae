"""Random requests give the same bytes with one row per step and in random batches."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import CheckpointConfig, save
from model.precision import can_compile
from model.schedule import ScheduleConfig
from model.spec import SHIPPED, SHIPPED_MODELS
from model.unet import UNet
from tests.e2e.conftest import GUIDANCE, Start, start_service
from tests.e2e.service import Service
from tests.tiny import tiny_unet

CLIENTS, ENOUGH_ROWS = 64, 16
REQUEST_TIMEOUT = 1800  # seconds; a slow machine needs many minutes for 64 clients with one row per step
VARYING_THREADS = {"OMP_NUM_THREADS": "2", "UNFOG_NUM_THREADS": ""}  # the service adapts threads to the load
BATCHED = (  # settings and the minimum of mean rows per step
    # The minimum is low, because auto chooses small steps if the machine was busy during the start.
    ({**VARYING_THREADS, "UNFOG_MAX_BATCH": "auto"}, 2),
    ({**VARYING_THREADS, "UNFOG_MAX_BATCH": "64"}, ENOUGH_ROWS),
    ({"UNFOG_MAX_BATCH": "23", "UNFOG_NUM_THREADS": "2"}, ENOUGH_ROWS),
)
Body = dict[str, Any]
NUM_CLASSES = {"default": 10, "fast": 10, "letters": 26, "cifar10": 10, "objects": 12}


def requests(number: int, steps: tuple[int, int], models: Sequence[str]) -> list[Body]:
    """Returns distinct requests of one image each, for random ones of these models."""
    choose = random.Random(4)
    bodies = []
    for seed in range(number):
        name = choose.choice(models)
        body = {"model": name, "label": choose.randrange(NUM_CLASSES[name]), "seed": seed}
        if name != "fast":  # its number of steps is fixed
            body["num_steps"] = choose.randint(*steps)
            body["sampler"] = choose.choice(["ddpm", "ddim", "dpmpp"])
            body["guidance_scale"] = choose.choice([1, 1.5, 3])
        bodies.append(body)
    return bodies


def save_random_network(folder: Path, name: str, network: UNet) -> str:
    """Saves a network as a model of `name`, and returns it in the form of UNFOG_MODELS."""
    classes = tuple(f"{name} {i}" for i in range(network.config.num_classes))
    config = CheckpointConfig(
        network.config, ScheduleConfig(), class_names=classes, guidance=GUIDANCE, training={"label_drop": 0.1}
    )
    save(folder / f"{name}.safetensors", network, config)
    return f"{name}={folder / name}.safetensors"


def generate(service: Service, bodies: list[Body], order: int) -> tuple[list[bytes], float]:
    """Sends the requests in a random order given by `order`. Returns the images and the mean rows per step."""
    indices = random.Random(order).sample(range(len(bodies)), len(bodies))
    service.client.timeout = REQUEST_TIMEOUT  # with one row per step, the last client waits for a long time
    service.wait_until_idle()
    before = service.metrics()
    with ThreadPoolExecutor(CLIENTS) as pool:
        responses = dict(zip(indices, pool.map(lambda index: service.images(**bodies[index]), indices), strict=True))
    return [responses[index][0] for index in range(len(bodies))], service.mean_rows_since(before)


def num_equal(one: list[bytes], other: list[bytes]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


def test_100_images_are_the_same_in_random_batches(start: Start) -> None:
    bodies = requests(100, steps=(3, 12), models=("default",))
    alone, rows = generate(start(UNFOG_MAX_BATCH="1", UNFOG_REQUEST_TIMEOUT=str(REQUEST_TIMEOUT)), bodies, order=0)
    assert rows == 1
    assert len(set(alone)) == len(bodies)
    batched, rows = generate(start(UNFOG_REQUEST_TIMEOUT=str(REQUEST_TIMEOUT), UNFOG_MAX_BATCH="64"), bodies, order=1)
    assert rows >= ENOUGH_ROWS
    assert num_equal(batched, alone) == len(bodies)


def test_images_of_models_of_different_shapes_are_the_same_in_random_batches(
    start: Start, checkpoint: Path, tmp_path: Path
) -> None:
    letters = save_random_network(tmp_path, "letters", tiny_unet(seed=5, num_classes=NUM_CLASSES["letters"]))
    network = tiny_unet(seed=6, image_size=32, image_channels=3, num_classes=NUM_CLASSES["objects"])
    models = f"default={checkpoint},{letters},{save_random_network(tmp_path, 'objects', network)}"
    bodies = requests(90, steps=(3, 12), models=("default", "letters", "objects"))
    settings = {"UNFOG_MODELS": models, "UNFOG_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT)}
    alone, rows = generate(start(UNFOG_MAX_BATCH="1", **settings), bodies, order=0)
    assert rows == 1
    assert len(set(alone)) == len(bodies)
    batched, rows = generate(start(UNFOG_MAX_BATCH="64", **settings), bodies, order=1)
    assert rows >= ENOUGH_ROWS / 3
    assert num_equal(batched, alone) == len(bodies)


@pytest.mark.slow
@pytest.mark.timeout(2 * REQUEST_TIMEOUT)
@pytest.mark.parametrize("compile_", ["on", "off"])
def test_500_images_of_the_shipped_models_are_the_same_in_random_batches(compile_: str) -> None:
    if compile_ == "on" and not can_compile():
        pytest.skip("needs a C++ compiler")
    bodies = requests(500, steps=(20, 100), models=("default", "default", "default", "fast", "letters", "cifar10"))
    with ExitStack() as stack:

        def service(**variables: str) -> Service:
            return start_service(
                stack,
                SHIPPED,
                UNFOG_MODELS=",".join(SHIPPED_MODELS),
                UNFOG_COMPILE=compile_,
                UNFOG_REQUEST_TIMEOUT=str(REQUEST_TIMEOUT),
                **variables,
            )

        # One row per step is slow, so two services share the requests. Each computes on one core.
        one_row = [service(UNFOG_MAX_BATCH="1", UNFOG_NUM_THREADS="1") for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            halves = list(pool.map(generate, one_row, (bodies[::2], bodies[1::2]), (0, 0)))
        assert [rows for _, rows in halves] == [1, 1]
        alone = [image for pair in zip(*(images for images, _ in halves), strict=True) for image in pair]
        assert len(set(alone)) == len(bodies)
        for order, (variables, enough_rows) in enumerate(BATCHED, start=1):
            batched, rows = generate(service(**variables), bodies, order)
            assert rows >= enough_rows
            assert num_equal(batched, alone) == len(bodies)
