"""Tests of a runner that runs ahead as on a GPU: it enqueues steps without waiting, and rounds shapes up."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.runner.device_state import PADDING
from app.runner.runner import Runner
from model.checkpoint import Checkpoint
from model.step import Rows, State, Stepped
from tests.app.runner.rows import CPU, draw, equal, mixed_rows, new_runner, rows_of, step


def ahead(loaded: Checkpoint, dtype: torch.dtype = torch.float32) -> Runner:
    """Returns a runner on a CPU that runs ahead as on a GPU."""
    return Runner({"default": loaded}, CPU, dtype, runs_ahead=True)


@pytest.mark.parametrize("max_batch", [64, 7, 3, 1])
def test_images_are_the_same_if_the_runner_runs_ahead(loaded: Checkpoint, max_batch: int) -> None:
    assert equal(draw(ahead(loaded), mixed_rows(), max_batch), draw(new_runner(loaded), mixed_rows()))


def test_shapes_are_rounded_up_if_the_runner_runs_ahead(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, shapes = ahead(loaded), set[tuple[int, int]]()
    network = runner._models["default"]
    step = network.step

    def record_shape(state: State, plans: Tensor, rows: Rows) -> Stepped:
        assert len(rows.slots) == len(rows.second)
        shapes.add((len(rows.slots), len(rows.source)))
        return step(state, plans, rows)

    network.step = record_shape
    for count in (1, 3, 5, 7, 8):
        draw(runner, rows_of(count, num_steps=2))
        draw(runner, rows_of(count, num_steps=2, guidance_scale=1.5))
    assert shapes == {(1, 1), (1, 2), (4, 4), (4, 8), (8, 8), (8, 16)}


def test_row_with_nan_fails_at_its_last_step_if_the_runner_runs_ahead(loaded: Checkpoint) -> None:
    loaded.network.class_embed.weight[3] = torch.nan
    runner = ahead(loaded)
    rows = [*rows_of(digit=2, num_steps=3), *rows_of(digit=3, num_steps=3), *rows_of(digit=4, num_steps=4)]
    assert [step(runner, rows) for _ in range(3)] == [[True] * 3, [True] * 3, [True, False, True]]
    runner.release(rows)
    healthy = rows_of(3, digit=2, num_steps=1)  # One of these slots was used by a row with NaN.
    assert step(runner, healthy) == [True] * 3


def test_padding_rows_do_not_change_the_padding_slot(loaded: Checkpoint) -> None:
    runner = ahead(loaded)
    before = [part[PADDING].clone() for part in runner._slots.state]
    draw(runner, rows_of(5, num_steps=3))
    assert all(
        torch.equal(part[PADDING], value_before) for part, value_before in zip(runner._slots.state, before, strict=True)
    )


def test_warm_up_runs_every_shape_if_the_runner_runs_ahead(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.runner.runner.BATCHES_AHEAD", (1, 2, 8))
    runner, shapes = ahead(loaded), set[tuple[int, int]]()
    network = runner._models["default"]
    step = network.step

    def record_shape(state: State, plans: Tensor, rows: Rows) -> Stepped:
        shapes.add((len(rows.step), len(rows.source)))
        return step(state, plans, rows)

    network.step = record_shape
    free = len(runner._slots._free)
    runner.warm_up(lambda: False)
    assert shapes == {(1, 1), (1, 2), (2, 2), (2, 4), (8, 8), (8, 16)}
    assert len(runner._slots._free) == free


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_row_has_the_same_pixels_in_any_batch_on_a_gpu(loaded: Checkpoint, tmp_path: Path, compiled: bool) -> None:
    runner = Runner({"default": loaded}, torch.device("cuda"), torch.bfloat16)
    if compiled:
        runner.compile(tmp_path, must=True)
    alone = [image for row in mixed_rows() for image in draw(runner, [row])]
    for max_batch, order in [(64, None), (64, 1), (7, 3), (2, 5)]:
        assert equal(draw(runner, mixed_rows(), max_batch, order), alone)
