"""Compares images of plans with those of the pipelines of diffusers, for the same seeds."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.pipelines.folder import load_pipeline
from model.pipelines.sampling import run_plan, torch_noise
from tests.pipelines import write_pipeline

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
SEEDS = [5, 6, 7]


@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("DDPMPipeline", DDPMScheduler(clip_sample=False, prediction_type="v_prediction")),
        ("DDPMPipeline", DDPMScheduler(variance_type="fixed_large")),
        ("DDIMPipeline", DDIMScheduler(clip_sample=False, prediction_type="v_prediction")),
        ("DDPMPipeline", DPMSolverMultistepScheduler(prediction_type="v_prediction")),
    ],
)
def test_images_are_those_of_the_pipeline_with_a_generator_for_each(
    kind: str, scheduler: Any, num_steps: int, tmp_path: Path
) -> None:
    theirs = write_pipeline(tmp_path, scheduler, kind=kind)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    expected = theirs(3, generator=generators, num_inference_steps=num_steps, output_type="np").images  # (3, H, W, C)
    pipeline = load_pipeline(tmp_path)
    plan = pipeline.scheduler.plan(num_steps)
    noise = torch.stack([torch_noise(seed, plan, pipeline.image_shape) for seed in SEEDS], dim=1)
    *_, (x_t, _) = run_plan(pipeline.network, plan, noise, torch.zeros(3).long())
    ours = (x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() < 1e-4
    assert ((255 * ours).round() == (255 * expected).round()).mean() >= 0.999


def test_images_do_not_depend_on_the_others_of_the_batch(tmp_path: Path) -> None:
    write_pipeline(tmp_path)
    pipeline = load_pipeline(tmp_path)
    plan = pipeline.scheduler.plan(5)
    noise = torch.stack([torch_noise(seed, plan, pipeline.image_shape) for seed in (1, 2)], dim=1)
    for order in ([0, 1], [1, 0]):
        *_, (x_t, x_0) = run_plan(pipeline.network, plan, noise[:, order], torch.zeros(2).long())
        first = (x_t[order.index(0)], x_0[order.index(0)])
        if order == [0, 1]:
            expected = first
    assert all(torch.equal(one, other) for one, other in zip(first, expected, strict=True))
