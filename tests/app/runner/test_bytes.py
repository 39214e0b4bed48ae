"""Compares rows of the real runner with each other and with the offline sampler."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from app.engine.job import ImageKey, Job, JobRequest, Options, Trajectory
from app.runner.runner import Runner
from model import checkpoint
from model.checkpoint import Checkpoint
from model.sampler import sample
from model.spec import SAMPLERS, Guidance, Sampler
from tests.app.fakes import new_engine, opened, tick
from tests.app.runner.rows import (
    CPU,
    DTYPES,
    GREY_AND_COLOUR,
    GUIDANCE,
    CountingNetwork,
    draw,
    equal,
    mixed_rows,
    new_runner,
    rows_of,
    step,
)


@GREY_AND_COLOUR
@DTYPES
def test_row_has_the_same_pixels_alone_and_in_any_batch(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner = new_runner(loaded, dtype)
    alone = [draw(runner, [row])[0] for row in mixed_rows()]
    assert len({image.tobytes() for image in alone}) == len(alone)
    for max_batch, order in [(64, None), (64, 1), (16, 2), (7, 3), (3, 4), (2, 5), (1, 6)]:
        assert equal(draw(runner, mixed_rows(), max_batch, order), alone)


@GREY_AND_COLOUR
@DTYPES
def test_two_models_in_one_step_generate_the_same_pixels_as_each_alone(
    loaded: Checkpoint, other: Checkpoint, dtype: torch.dtype
) -> None:
    def fast_rows(model: str) -> list[Trajectory]:
        return rows_of(5, seed=9, num_steps=4, sampler="ddim", model=model)

    expected = draw(new_runner(copy.deepcopy(other), dtype), fast_rows("default"))
    expected_mixed = draw(new_runner(copy.deepcopy(loaded), dtype), mixed_rows())
    both = Runner({"default": loaded, "fast": other}, CPU, dtype)
    both.warm_up(lambda: False)
    assert equal(draw(both, fast_rows("fast")), expected)
    for max_batch, order in [(64, None), (64, 1), (7, 2), (3, 3)]:
        images = draw(both, [*fast_rows("fast"), *mixed_rows()], max_batch, order)
        assert equal(images[:5], expected)
        assert equal(images[5:], expected_mixed)


@DTYPES
def test_row_that_joins_later_has_the_same_pixels(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner = new_runner(loaded, dtype)
    alone = draw(runner, rows_of(num_steps=6, guidance_scale=1.5))
    early, late = mixed_rows(), rows_of(num_steps=6, guidance_scale=1.5)
    for _ in range(3):
        step(runner, [row for row in early if row.steps_left])
    assert equal(draw(runner, [*early, *late])[-1:], alone)


KEYS = (ImageKey(3, 7, 0), ImageKey(9, 7, 0), ImageKey(3, 2**53 - 1, 0), ImageKey(3, 7, 4), ImageKey(0, 8, 63))


def rows_of_keys(num_steps: int = 6, sampler: Sampler = "ddpm", guidance_scale: float = 1.0) -> list[Trajectory]:
    """Returns the rows of a job whose images have the digits, seeds and indices of KEYS."""
    options = Options(KEYS[0].label, KEYS[0].seed, num_steps, sampler, guidance_scale)
    return Job(JobRequest(options, len(KEYS), images=KEYS)).unfinished


@DTYPES
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_with_its_own_digit_seed_and_index_equals_that_of_a_separate_job(
    loaded: Checkpoint, dtype: torch.dtype, sampler: Sampler, guidance_scale: float
) -> None:
    runner = new_runner(loaded, dtype)

    def own_rows() -> list[Trajectory]:
        return rows_of_keys(sampler=sampler, guidance_scale=guidance_scale)

    separate = [
        draw(
            runner,
            rows_of(
                key.index + 1,
                digit=key.label,
                seed=key.seed,
                num_steps=6,
                sampler=sampler,
                guidance_scale=guidance_scale,
            )[-1:],
        )[0]
        for key in KEYS
    ]
    assert len({image.tobytes() for image in separate}) == len(KEYS)
    assert equal(draw(runner, own_rows()), separate)
    for max_batch, order in [(64, None), (3, 2)]:
        assert equal(draw(runner, [*own_rows(), *mixed_rows()], max_batch, order)[: len(KEYS)], separate)


def test_two_runners_generate_the_same_pixels(path: Path) -> None:
    first, second = (draw(new_runner(checkpoint.load(path)), mixed_rows()) for _ in range(2))
    assert equal(first, second)


def test_image_does_not_depend_on_the_count_of_the_request(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    assert equal(draw(runner, rows_of(5))[:2], draw(runner, rows_of(2)))


@GREY_AND_COLOUR
@pytest.mark.parametrize("num_steps", [1, 9, 30])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), GUIDANCE], ids=["off", "everywhere", "interval"])
def test_rows_equal_the_images_of_the_offline_sampler(
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
        *rows_of(1, digit=0, seed=5, **options),  # type: ignore[arg-type] # These are the types that rows_of takes.
        *rows_of(2, digit=4, seed=2**53 - 1, **options),  # type: ignore[arg-type]
        *rows_of(1, digit=9, seed=0, **options),  # type: ignore[arg-type]
    ]
    generated = torch.stack([torch.from_numpy(image).float() for image in draw(runner, rows)])
    offline = ((x_0 + 1) * 127.5).permute(0, 2, 3, 1).reshape(generated.shape)
    # Rounding to 8 bits changes a value by at most 0.5.
    torch.testing.assert_close(generated, offline, rtol=0, atol=0.51)


def test_row_has_a_second_evaluation_only_in_guided_steps(loaded: Checkpoint) -> None:
    runner = new_runner(loaded, torch.bfloat16)  # bfloat16 batches are never padded.
    network = CountingNetwork(runner)
    free, guided = rows_of(8, num_steps=10), rows_of(3, num_steps=10, guidance_scale=2.0)  # t is 100, 90, ..., 10.
    for _ in range(10):
        step(runner, [*free, *guided])
    assert network.rows == [11, 11] + [14] * 7 + [11]


def test_each_sampler_has_its_own_guidance_interval(loaded: Checkpoint) -> None:
    config = dataclasses.replace(loaded.config, guidance_by_sampler={"ddim": Guidance(3.0, 15, 35)})
    runner = new_runner(dataclasses.replace(loaded, config=config), torch.bfloat16)
    network = CountingNetwork(runner)
    assert [runner.models["default"].guidance_scale[sampler] for sampler in ("ddpm", "ddim")] == [2.0, 3.0]
    rows = [
        *rows_of(2, num_steps=10, guidance_scale=2.0),
        *rows_of(3, num_steps=10, guidance_scale=2.0, sampler="ddim"),
    ]
    for _ in range(10):  # t is 100, 90, ..., 10. Guidance is from 80 to 20, with ddim only at 30 and 20.
        step(runner, rows)
    assert network.rows == [5, 5] + [7] * 5 + [10] * 2 + [5]


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", 10), ("ddim", 7), ("dpmpp", 10), ("ddpm", 1)])
def test_predicted_evaluations_equal_the_actual_evaluations(
    loaded: Checkpoint, sampler: Sampler, num_steps: int
) -> None:
    runner = new_runner(loaded, torch.bfloat16)
    network = CountingNetwork(runner)
    options = Options(1, 0, num_steps, sampler, 2.0)
    guided_steps = runner.models["default"].guided_steps(options)
    job = Job(JobRequest(options, 3, guided_steps=guided_steps))
    predicted = []
    for _ in range(num_steps):
        predicted.append(sum(row.evaluations for row in job.unfinished))
        step(runner, job.unfinished)
    assert network.rows == predicted
    assert sum(predicted) == 3 * job.request.evaluations_from(0)


def test_row_without_guidance_has_one_evaluation_per_step(loaded: Checkpoint) -> None:
    runner = new_runner(loaded, torch.bfloat16)
    network = CountingNetwork(runner)
    draw(runner, rows_of(20, num_steps=4))
    assert network.rows == [20] * 4


@DTYPES
def test_background_images_have_the_same_pixels_beside_interactive_jobs(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner, request = new_runner(loaded, dtype), JobRequest(Options(3, 1, 6, "ddpm", 1.0), 5)
    engine = opened(new_engine(runner, max_batch=3))
    background = Job(dataclasses.replace(request, is_background=True))
    engine.submit(background)
    interactive: list[Job] = []
    while not background.closed:
        tick(engine)
        if len(interactive) < 3:
            interactive.append(Job(request))
            engine.submit(interactive[-1])
    expected = draw(runner, Job(request).unfinished)
    assert all(equal(job.future.result(0), expected) for job in (background, *interactive))
