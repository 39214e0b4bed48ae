"""Rows of the real runner against each other and against the offline sampler."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from app.engine.job import Job, JobRequest, Options, Trajectory
from app.runner.runner import Runner
from model import checkpoint
from model.checkpoint import Checkpoint
from model.sampler import SAMPLERS, Guidance, Sampler, sample
from tests.app.runner.rows import CPU, DTYPES, GUIDANCE, Counting, company, draw, equal, new_runner, rows_of, step


@DTYPES
def test_a_row_has_the_same_pixels_alone_and_in_any_company(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner = new_runner(loaded, dtype)
    alone = [draw(runner, [row])[0] for row in company()]
    assert len({image.tobytes() for image in alone}) == len(alone)
    for max_batch, order in [(64, None), (64, 1), (16, 2), (7, 3), (3, 4), (2, 5), (1, 6)]:
        assert equal(draw(runner, company(), max_batch, order), alone)


@DTYPES
def test_two_models_in_one_loop_draw_what_each_draws_alone(
    loaded: Checkpoint, other: Checkpoint, dtype: torch.dtype
) -> None:
    def fast_rows(model: str) -> list[Trajectory]:
        return rows_of(5, seed=9, num_steps=4, sampler="ddim", model=model)

    expected = draw(new_runner(copy.deepcopy(other), dtype), fast_rows("default"))
    beside = draw(new_runner(copy.deepcopy(loaded), dtype), company())
    both = Runner({"default": loaded, "fast": other}, CPU, dtype)
    both.warm_up(lambda: False)
    assert equal(draw(both, fast_rows("fast")), expected)
    for max_batch, order in [(64, None), (64, 1), (7, 2), (3, 3)]:
        images = draw(both, [*fast_rows("fast"), *company()], max_batch, order)
        assert equal(images[:5], expected)
        assert equal(images[5:], beside)


@DTYPES
def test_a_row_that_joins_later_has_the_same_pixels(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner = new_runner(loaded, dtype)
    alone = draw(runner, rows_of(num_steps=6, guidance_scale=1.5))
    crowd, late = company(), rows_of(num_steps=6, guidance_scale=1.5)
    for _ in range(3):
        step(runner, [row for row in crowd if row.steps_left])
    assert equal(draw(runner, [*crowd, *late])[-1:], alone)


def test_another_runner_draws_the_same(path: Path) -> None:
    first, second = (draw(new_runner(checkpoint.load(path)), company()) for _ in range(2))
    assert equal(first, second)


def test_an_image_does_not_depend_on_how_many_are_asked_for(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    assert equal(draw(runner, rows_of(5))[:2], draw(runner, rows_of(2)))


@pytest.mark.parametrize("num_steps", [1, 9, 30])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), GUIDANCE], ids=["off", "everywhere", "interval"])
def test_rows_are_what_the_offline_sampler_draws(
    loaded: Checkpoint, sampler: Sampler, guidance: Guidance, num_steps: int
) -> None:
    y, index = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 0, 1, 0])
    seed = torch.tensor([5, 2**53 - 1, 2**53 - 1, 0])
    x_0 = sample(
        loaded.network,
        loaded.schedule,
        y,
        seed=seed,
        index=index,
        image_shape=loaded.image_shape,
        sampler=sampler,
        num_steps=num_steps,
        guidance=guidance,
        null_label=loaded.network.null_label,
    )  # (4, C, H, W)
    assert x_0.std() > 0.1
    runner = new_runner(dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, guidance=guidance)))
    options = {"num_steps": num_steps, "sampler": sampler, "guidance_scale": guidance.scale}
    rows = [
        *rows_of(1, digit=0, seed=5, **options),  # type: ignore[arg-type] # they are what rows_of takes
        *rows_of(2, digit=4, seed=2**53 - 1, **options),  # type: ignore[arg-type]
        *rows_of(1, digit=9, seed=0, **options),  # type: ignore[arg-type]
    ]
    drawn = torch.stack([torch.from_numpy(image).float() for image in draw(runner, rows)])
    offline = ((x_0 + 1) * 127.5).permute(0, 2, 3, 1).reshape(drawn.shape)
    torch.testing.assert_close(drawn, offline, rtol=0, atol=0.51)  # the rounding, and float32's own


def test_a_row_pays_for_guidance_only_where_it_acts(loaded: Checkpoint) -> None:
    runner = new_runner(loaded, torch.bfloat16)  # which is never padded
    network = Counting(runner)
    free, guided = rows_of(8, num_steps=10), rows_of(3, num_steps=10, guidance_scale=2.0)  # t = 100, 90, ... 10
    for _ in range(10):
        step(runner, [*free, *guided])
    assert network.rows == [11, 11] + [14] * 7 + [11]


def test_each_samplers_rows_are_guided_in_its_own_interval(loaded: Checkpoint) -> None:
    config = dataclasses.replace(loaded.config, guidance_by_sampler={"ddim": Guidance(3.0, 15, 35)})
    runner = new_runner(dataclasses.replace(loaded, config=config), torch.bfloat16)
    network = Counting(runner)
    assert [runner.models["default"].guidance_scale[sampler] for sampler in ("ddpm", "ddim")] == [2.0, 3.0]
    rows = [
        *rows_of(2, num_steps=10, guidance_scale=2.0),
        *rows_of(3, num_steps=10, guidance_scale=2.0, sampler="ddim"),
    ]
    for _ in range(10):  # t = 100, 90, ... 10: 80 to 20 are guided, 30 and 20 of ddim's
        step(runner, rows)
    assert network.rows == [5, 5] + [7] * 5 + [10] * 2 + [5]


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", 10), ("ddim", 7), ("dpmpp", 10), ("ddpm", 1)])
def test_the_evaluations_that_are_forecast_are_those_that_are_made(
    loaded: Checkpoint, sampler: Sampler, num_steps: int
) -> None:
    runner = new_runner(loaded, torch.bfloat16)
    network = Counting(runner)
    guided_steps = runner.models["default"].guided_steps(sampler, num_steps)
    job = Job(JobRequest(Options(1, 0, num_steps, sampler, 2.0), 3, guided_steps=guided_steps))
    forecast = []
    for _ in range(num_steps):
        forecast.append(sum(row.evaluations for row in job.unfinished))
        step(runner, job.unfinished)
    assert network.rows == forecast
    assert sum(forecast) == 3 * job.request.evaluations_from(0)


def test_without_guidance_there_is_one_evaluation_a_row(loaded: Checkpoint) -> None:
    runner = new_runner(loaded, torch.bfloat16)
    network = Counting(runner)
    draw(runner, rows_of(20, num_steps=4))
    assert network.rows == [20] * 4
