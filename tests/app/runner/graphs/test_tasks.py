"""Tests that rows of all tasks have the same values on graphs as on a CPU."""

import copy

import pytest
import torch

from app.engine.job import StepRows
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.graphs.shapes import Shape
from model.checkpoint import Checkpoint
from tests.app.runner.late_device import LateDevice
from tests.app.runner.rows import GREY_AND_COLOUR, new_runner
from tests.app.runner.task_rows import all_rows, drawings, finish, inpaint_rows, recognition_rows


def on_graphs(loaded: Checkpoint, fixed_rows: int | None = None, num_slots: int = 128) -> GraphRunner:
    models = {"default": copy.deepcopy(loaded)}
    return GraphRunner(models, LateDevice(), torch.float32, num_slots=num_slots, most_rows=8, fixed_rows=fixed_rows)


@GREY_AND_COLOUR
@pytest.mark.parametrize("max_batch", [64, 7])
def test_rows_of_all_tasks_have_the_values_of_the_cpu_runner(loaded: Checkpoint, max_batch: int) -> None:
    runner = on_graphs(loaded)
    info = runner.models["default"]
    assert finish(runner, all_rows(info), max_batch, order=2) == finish(new_runner(loaded), all_rows(info))


@pytest.mark.parametrize("fixed_rows", [4, 24])
def test_rows_of_all_tasks_fit_into_graphs_of_one_size(loaded: Checkpoint, fixed_rows: int) -> None:
    """The search for a digit needs a row for each class, so that a step can need several calls."""
    runner = on_graphs(loaded, fixed_rows)
    info = runner.models["default"]
    assert finish(runner, all_rows(info), max_batch=10) == finish(new_runner(loaded), all_rows(info))
    assert len(list(runner._steps)) == 1


def test_every_evaluation_of_a_recognition_row_has_its_class(loaded: Checkpoint) -> None:
    """Three rows with 10 evaluations each have 27 further evaluations, which are padded to 28."""
    runner = on_graphs(loaded)
    info = runner.models["default"]
    rows = [row for seed in (10, 11, 12) for row in recognition_rows(info, seed)]
    runner.step(StepRows.of(rows))
    assert set(runner._steps) == {("default", Shape(3, 28, has_known=True))}
    expected = new_runner(loaded)
    same_rows = [row for seed in (10, 11, 12) for row in recognition_rows(info, seed)]
    expected.step(StepRows.of(same_rows))
    assert runner.errors(rows).wait() == expected.errors(same_rows).wait()


def test_noise_of_long_paths_with_known_pixels_is_drawn_again(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded)
    info, slots = runner.models["default"], runner._slots["default"]
    assert slots.state.noise is not None
    slots.noise_steps, slots.state.noise = 2, slots.state.noise[:, :3].contiguous()  # that of x_T and of two steps
    outcomes = [
        finish(each, [*inpaint_rows(info, 5), *recognition_rows(info, 9)]) for each in (runner, new_runner(loaded))
    ]
    assert outcomes[0] == outcomes[1]


@GREY_AND_COLOUR
def test_known_pixels_of_a_slot_do_not_change_the_image_of_its_next_row(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded, num_slots=2)
    info = runner.models["default"]
    finish(runner, inpaint_rows(info, 5, count=2))
    outcomes = [finish(each, [*drawings(info)[:1], *inpaint_rows(info, 6)]) for each in (runner, new_runner(loaded))]
    assert outcomes[0] == outcomes[1]
