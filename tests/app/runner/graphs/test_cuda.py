"""Compares the graph runner on a GPU with the runner of a CPU."""

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from app.engine.job import Pixels
from app.runner.device import choose_device
from app.runner.graphs.device import CudaDevice
from app.runner.graphs.graph_runner import GraphRunner
from model.checkpoint import Checkpoint
from tests.app.runner.rows import GREY_AND_COLOUR, draw, equal, mixed_rows, new_runner, rows_of, step
from tests.app.runner.task_rows import all_rows, finish

pytestmark = [pytest.mark.gpu, GREY_AND_COLOUR]

# Largest mean absolute difference of the pixels (0..255) of an image. The kernels of a GPU round differently.
LARGEST_LEVELS = 1.0


def on_gpu(loaded: Checkpoint, fixed_rows: int | None = None, num_slots: int = 64) -> GraphRunner:
    device = choose_device("cuda:0")
    models = {"default": copy.deepcopy(loaded)}
    options = {"num_slots": num_slots, "most_rows": 8, "fixed_rows": fixed_rows}
    return GraphRunner(models, CudaDevice(device), torch.float32, **options)  # type: ignore[arg-type]


def assert_near(images: Iterable[Pixels | None], expected: Iterable[Pixels]) -> None:
    for image, other in zip(images, expected, strict=True):
        assert image is not None
        assert np.abs(image.astype(np.float64) - other).mean() <= LARGEST_LEVELS


@contextmanager
def without_synchronisation() -> Iterator[None]:
    """Raises if PyTorch reports that the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("max_batch", [64, 7, 1])
def test_images_of_a_gpu_are_near_those_of_the_cpu_runner(loaded: Checkpoint, max_batch: int) -> None:
    expected = draw(new_runner(copy.deepcopy(loaded)), mixed_rows())
    assert_near(draw(on_gpu(loaded), mixed_rows(), max_batch), expected)


def test_slots_that_are_used_again_do_not_change_the_images_of_ended_rows(loaded: Checkpoint) -> None:
    choose, runner, rows, readings = random.Random(1), on_gpu(loaded, num_slots=4), mixed_rows(), []
    expected = dict(zip(rows, draw(new_runner(copy.deepcopy(loaded)), rows), strict=True))
    for row in rows:
        row.step = 0
    while left := [row for row in rows if row.steps_left]:
        chosen = choose.sample(left, choose.randint(1, len(left)))
        assert all(step(runner, chosen))
        ended = [row for row in chosen if not row.steps_left]
        readings.append((ended, runner.pixels(ended)))
        runner.release(ended)
    for ended, reading in readings:
        assert_near(reading.wait(), [expected[row] for row in ended])


def test_rows_of_all_tasks_are_near_those_of_the_cpu_runner(loaded: Checkpoint) -> None:
    runner = on_gpu(loaded)
    info = runner.models["default"]
    rows = zip(finish(runner, all_rows(info)), finish(new_runner(loaded), all_rows(info)), strict=True)
    for (image, errors), (expected, expected_errors) in rows:
        if errors:  # A class that is dropped later can differ, because the errors of two classes can be nearly equal.
            assert errors[0] == pytest.approx(expected_errors[0], rel=1e-3)
        else:
            assert_near([np.frombuffer(image, np.uint8)], [np.frombuffer(expected, np.uint8)])


def test_rows_of_steps_of_one_size_have_the_same_bytes_in_every_batch(loaded: Checkpoint) -> None:
    alone = draw(on_gpu(loaded, fixed_rows=16), mixed_rows(), max_batch=1)
    assert equal(draw(on_gpu(loaded, fixed_rows=16), mixed_rows(), max_batch=16, order=3), alone)


def test_steps_and_readings_do_not_wait_for_the_gpu(loaded: Checkpoint) -> None:
    runner, rows = on_gpu(loaded), rows_of(4, num_steps=12)
    for _ in range(3):  # the first steps capture graphs, which waits
        step(runner, rows)
    runner.pixels(rows).wait()
    with without_synchronisation():
        for _ in range(3):
            step(runner, rows)
        reading = runner.pixels(rows)
    assert all(image is not None for image in reading.wait())


def test_row_with_nan_on_a_gpu_fails_alone(loaded: Checkpoint) -> None:
    loaded.network.class_embed.weight[3] = torch.nan
    runner = on_gpu(loaded)
    rows = [*rows_of(digit=2, num_steps=3), *rows_of(digit=3, num_steps=3), *rows_of(digit=4, num_steps=4)]
    for _ in range(3):
        assert step(runner, rows) == [True] * 3
    assert [image is None for image in runner.pixels(rows).wait()] == [False, True, False]
