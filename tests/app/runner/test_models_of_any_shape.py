"""Models of different shapes and numbers of classes in one runner: each computes the same bits as alone."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from app.engine.interface import ModelInfo
from app.engine.job import Trajectory
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.runner import Runner
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.schedule import ScheduleConfig
from tests.app.runner.late_device import LateDevice
from tests.app.runner.rows import CPU, GUIDANCE, rows_of, step
from tests.app.runner.task_rows import all_rows, finish
from tests.tiny import tiny_unet

Models = dict[str, Checkpoint]
NewRunner = Callable[[Models], Runner]


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Returns a checkpoint of colour images with 20 named classes."""
    network = tiny_unet(seed=3, image_size=12, image_channels=3, num_classes=20)
    for parameter in network.parameters():
        parameter.mul_(0.6)
    names = tuple(f"colour {label}" for label in range(20))
    config = CheckpointConfig(
        network.config, ScheduleConfig(), class_names=names, guidance=GUIDANCE, training={"label_drop": 0.1}
    )
    path = tmp_path_factory.mktemp("colours") / "colours.safetensors"
    checkpoint.save(path, network, config)
    return checkpoint.load(path)


def on_cpu(models: Models) -> Runner:
    return Runner(models, CPU, torch.float32)


def on_graphs(models: Models) -> Runner:
    return GraphRunner(models, LateDevice(), torch.float32, num_slots=16, most_rows=8)


RUNNERS = pytest.mark.parametrize("new_runner", [on_cpu, on_graphs])


def rows_for(info: ModelInfo) -> list[Trajectory]:
    """Returns rows of all tasks for a model."""
    rows = all_rows(info)
    for job in {row.job for row in rows}:
        search = job.request.search
        if search:
            search = replace(search, options=replace(search.options, model=info.name))
        job.request = replace(job.request, options=replace(job.request.options, model=info.name), search=search)
    return rows


@RUNNERS
@pytest.mark.parametrize(("max_batch", "order"), [(64, None), (64, 1), (7, 2), (3, 3)])
def test_rows_of_two_shapes_have_the_same_outcome_together_as_alone(
    loaded: Checkpoint, colours: Checkpoint, new_runner: NewRunner, max_batch: int, order: int | None
) -> None:
    models = {"default": loaded, "colours": colours}
    alone = []
    for name, each in models.items():
        runner = on_cpu({name: copy.deepcopy(each)})
        alone += finish(runner, rows_for(runner.models[name]))
    together = new_runner(copy.deepcopy(models))
    rows = [row for info in together.models.values() for row in rows_for(info)]
    assert finish(together, rows, max_batch, order) == alone


@RUNNERS
def test_rows_before_their_first_step_are_black_in_the_shape_of_their_model(
    loaded: Checkpoint, colours: Checkpoint, new_runner: NewRunner
) -> None:
    runner = new_runner({"default": loaded, "colours": colours})
    rows = [*rows_of(2, model="colours"), *rows_of(1)]
    assert [image.shape for image in runner.pixels(rows).wait()] == [(12, 12, 3), (12, 12, 3), (8, 8)]
    step(runner, rows[1:])
    assert [image.any() for image in runner.pixels(rows).wait()] == [False, True, True]


@RUNNERS
def test_each_model_has_its_own_slots(loaded: Checkpoint, colours: Checkpoint, new_runner: NewRunner) -> None:
    runner = new_runner({"default": loaded, "colours": colours})
    rows = [*rows_of(3, model="colours"), *rows_of(2)]
    free = {name: len(slots._free) for name, slots in runner._slots.items()}
    step(runner, rows)
    assert {name: free[name] - len(slots._free) for name, slots in runner._slots.items()} == {
        "default": 2,
        "colours": 3,
    }
    runner.release(rows)
    assert {name: len(slots._free) for name, slots in runner._slots.items()} == free


def test_default_model_is_the_first_one_whatever_its_name(loaded: Checkpoint, colours: Checkpoint) -> None:
    runner = on_cpu({"colours": colours, "default": loaded})
    assert runner.default_model == "colours"
    times = runner.warm_up(lambda: False)
    assert times.of("colours") is not times.of("default")


def test_row_of_one_model_that_fails_leaves_those_of_the_other_unchanged(
    loaded: Checkpoint, colours: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = on_cpu({"default": loaded, "colours": colours})
    expected = finish(on_cpu({"default": copy.deepcopy(loaded)}), rows_of(2, num_steps=3))
    rows, others = rows_of(2, num_steps=3), rows_of(1, num_steps=3, model="colours")
    denoise = runner._models["colours"].program.denoise

    def fail(*arguments: object) -> None:
        raise RuntimeError("the second network fails")

    monkeypatch.setattr(runner._models["colours"].program, "denoise", fail)
    with pytest.raises(RuntimeError, match="second network"):
        step(runner, [*rows, *others])
    monkeypatch.setattr(runner._models["colours"].program, "denoise", denoise)
    for row in rows:
        row.step = 0
    assert finish(runner, rows) == expected


def test_noise_of_large_images_is_drawn_in_parts(
    loaded: Checkpoint, colours: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"default": loaded, "colours": colours}
    expected = [
        finish(on_cpu({name: copy.deepcopy(each)}), rows_for(on_cpu({name: each}).models[name]))
        for name, each in models.items()
    ]
    monkeypatch.setattr("app.runner.graphs.graph_runner.MOST_NOISE_BYTES", 4 * 16 * 8 * 8 * 6)  # of 5 steps, if grey
    runner = on_graphs(copy.deepcopy(models))
    assert {name: slots.noise_steps for name, slots in runner._slots.items()} == {"default": 5, "colours": 1}
    rows = [row for info in runner.models.values() for row in rows_for(info)]
    assert finish(runner, rows) == [outcome for outcomes in expected for outcome in outcomes]


def test_fixed_number_of_rows_depends_only_on_the_own_model(loaded: Checkpoint, colours: Checkpoint) -> None:
    models = {"default": loaded, "colours": colours}
    runner = GraphRunner(models, LateDevice(), torch.float32, num_slots=16, fixed_rows=12)
    assert {name: shape.rows for name, shape in runner._fixed.items()} == {"default": 12, "colours": 20}
    assert runner.max_rows == 12
