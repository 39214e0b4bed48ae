"""Runs a plan of a pipeline, with the noise that diffusers draws for the same seed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.pipelines.folder import PipelineNetwork
from model.pipelines.schedulers import PipelinePlan, pipeline_step


def torch_noise(seed: int, plan: PipelinePlan, image_shape: tuple[int, int, int]) -> Tensor:
    """Returns the noise of one image: that of the first x_t and of each step, (1 + num_steps, C, H, W) float32.

    It is what a pipeline of diffusers draws with `torch.Generator("cpu").manual_seed(seed)`. In a batch, each image has
    a generator of its own, so that an image does not depend on the others. Steps that draw no noise have zeros.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, *image_shape)  # the shape decides which values a generator draws
    draws = (True, *plan.draws_noise)
    return torch.cat([torch.randn(shape, generator=generator) if drawn else torch.zeros(shape) for drawn in draws])


@torch.inference_mode()
def run_plan(network: PipelineNetwork, plan: PipelinePlan, noise: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x_t before the first step and after each step, with the predicted x_0 of that step.

    Both are (B, C, H, W). `noise` is (1 + num_steps, B, C, H, W) and y is (B,). x_0 is 0 before the first step.
    """
    x_t, x_0 = noise[0] * plan.start, torch.zeros_like(noise[0])
    yield x_t, x_0
    for row, z in zip(plan.table, noise[1:], strict=True):
        rows = row.expand(len(y), -1)  # (B, 10)
        x_t, x_0 = pipeline_step(x_t, x_0, network(x_t, rows[:, 0], y), z, rows)
        yield x_t, x_0
