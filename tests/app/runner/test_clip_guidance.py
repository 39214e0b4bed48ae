"""Compares rows with CLIP guidance alone, in batches, and with the offline process."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engine.job import ClipTarget, Job, JobRequest, Options, Pixels, StepRows, Trajectory
from app.runner import warm_up
from app.runner.clip import ClipModel
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.runner import Runner
from app.runner.warm_up import CLIP_ROUNDS
from model import process
from model.checkpoint import Checkpoint
from model.clip import Clip
from model.clip_guidance import ClipGuidance, ClipGuidedStep
from model.pixels import to_pixels
from model.prompts import digit_prompt
from model.sampler import make_plan
from model.spec import CALL_ROWS, SAMPLERS, Sampler
from tests.app.runner.late_device import LateDevice
from tests.app.runner.rows import CPU, DTYPES, GREY_AND_COLOUR, GUIDANCE, draw, equal, mixed_rows, rows_of

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip()


def runner_with_clip(loaded: Checkpoint, clip: Clip, dtype: torch.dtype) -> Runner:
    return Runner({"default": loaded}, CPU, dtype, clip=ClipModel(clip))


def guided_rows(
    runner: Runner, clip: Clip, count: int = 1, *, digit: int = 3, sampler: Sampler = "ddpm", scale: float = 1.0
) -> list[Trajectory]:
    """Returns the rows of a job with CLIP guidance."""
    options = Options(digit, 1, 12, sampler, GUIDANCE.scale, clip_guidance_scale=scale)
    text = clip.embed_prompts([digit_prompt(digit)])[0].numpy()
    target = ClipTarget(scale, text, runner.models["default"].clip_steps(options), evaluations=3)
    return Job(JobRequest(options, count, clip=target)).unfinished


def mixed_guided_rows(runner: Runner, clip: Clip) -> list[Trajectory]:
    jobs = [guided_rows(runner, clip, 1 + i % 3, digit=i, scale=0.5 + i, sampler=SAMPLERS[i % 3]) for i in range(6)]
    return [row for rows in jobs for row in rows]


@DTYPES
def test_row_with_clip_guidance_has_the_same_pixels_alone_and_in_any_batch(
    loaded: Checkpoint, clip: Clip, dtype: torch.dtype
) -> None:
    runner = runner_with_clip(loaded, clip, dtype)
    alone = [draw(runner, [row])[0] for row in mixed_guided_rows(runner, clip)]
    assert len(alone) > CALL_ROWS
    for max_batch, order in [(64, 1), (7, 2)]:
        rows = [*mixed_guided_rows(runner, clip), *mixed_rows()]
        assert equal(draw(runner, rows, max_batch, order)[: len(alone)], alone)


@DTYPES
def test_rows_without_clip_guidance_keep_their_pixels_next_to_rows_with_it(
    loaded: Checkpoint, clip: Clip, dtype: torch.dtype
) -> None:
    expected = draw(Runner({"default": copy.deepcopy(loaded)}, CPU, dtype), mixed_rows())
    runner = runner_with_clip(loaded, clip, dtype)
    for max_batch, order in [(64, None), (7, 1)]:
        rows = [*mixed_rows(), *mixed_guided_rows(runner, clip)]
        assert equal(draw(runner, rows, max_batch, order)[: len(expected)], expected)


@GREY_AND_COLOUR
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_equal_those_of_the_offline_process(loaded: Checkpoint, clip: Clip, sampler: Sampler) -> None:
    runner = runner_with_clip(loaded, clip, torch.float32)
    found = draw(runner, guided_rows(runner, clip, 3, sampler=sampler))
    plan, index = make_plan(loaded.schedule, sampler, 12), torch.arange(3)
    text = clip.embed_prompts([digit_prompt(3)]).expand(3, -1)
    x_0 = process.draw(
        ClipGuidedStep(runner._models["default"].program, clip, ClipGuidance(1.0), text),
        [plan] * 3,
        loaded.image_shape,
        seed=torch.ones(3, dtype=torch.int64),
        index=index,
        y=torch.full_like(index, 3),
        null_label=loaded.network.null_label,
        guidance=GUIDANCE,
    )
    expected = to_pixels(x_0).permute(0, 2, 3, 1).numpy()
    assert equal(found, [image.reshape(found[0].shape) for image in expected])
    assert not equal(found, draw(runner, rows_of(3, num_steps=12, sampler=sampler, guidance_scale=GUIDANCE.scale)))


@GREY_AND_COLOUR
def test_images_are_the_same_on_graphs(loaded: Checkpoint, clip: Clip) -> None:
    def drawn(runner: Runner) -> list[Pixels]:
        return draw(runner, [*mixed_guided_rows(runner, clip), *mixed_rows()], max_batch=7)

    models = {"default": copy.deepcopy(loaded)}
    on_graphs = GraphRunner(models, LateDevice(), torch.float32, clip=ClipModel(clip), num_slots=64, most_rows=8)
    assert equal(drawn(on_graphs), drawn(runner_with_clip(loaded, clip, torch.float32)))


def test_row_whose_gradient_is_not_finite_fails_alone(loaded: Checkpoint, clip: Clip) -> None:
    runner = runner_with_clip(loaded, clip, torch.float32)
    rows = [*guided_rows(runner, clip), *guided_rows(runner, clip), *rows_of(num_steps=12)]
    bad = rows[0].job
    text = np.full_like(bad.request.clip.text, np.nan) if bad.request.clip else None
    bad.request = replace(bad.request, clip=replace(bad.request.clip, text=text))
    not_finite = set[Trajectory]()
    for _ in range(12):
        not_finite.update(runner.step(StepRows.of(rows)))
        for row in rows:
            row.step += 1
    assert not_finite == {rows[0]}


def test_warm_up_measures_a_call_of_clip(loaded: Checkpoint, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    embed = clip.embed_images

    def count(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return embed(x)

    monkeypatch.setattr(clip, "embed_images", count)
    monkeypatch.setattr(warm_up, "LONGEST_TIMING_SECONDS", math.inf)
    runner = runner_with_clip(loaded, clip, torch.float32)
    times = runner.warm_up(lambda: False)
    assert times.clip_seconds > 0
    assert times.clip_evaluations >= 1
    assert calls == [CALL_ROWS] * CLIP_ROUNDS * len(runner.threads.counts)


def test_service_without_clip_has_no_duration_of_a_call(loaded: Checkpoint) -> None:
    runner = Runner({"default": loaded}, CPU, torch.float32)
    times = runner.warm_up(lambda: False)
    assert (times.clip_seconds, times.clip_evaluations) == (0.0, 0)
