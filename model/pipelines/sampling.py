"""Runs a plan of a pipeline, with the noise that diffusers draws for the same seed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.pipelines.folder import PipelineNetwork
from model.pipelines.schedulers import PipelinePlan, clipped_x_0, pipeline_step
from model.sampler import COLUMN_OF_S


class TorchNoise:
    """The noise of one image, as a pipeline of diffusers draws it with `torch.Generator("cpu").manual_seed(seed)`.

    In a batch, each image has a generator of its own, so that an image does not depend on the others.
    """

    def __init__(self, seed: int, image_shape: tuple[int, int, int]) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._shape = (1, *image_shape)  # the shape decides which values a generator draws
        self._number, self._z = -1, torch.empty(0)

    def draw(self, number: int) -> Tensor:
        """Returns the noise (1, C, H, W) with this number; 0 is that of the first x_t.

        Ask for the numbers in order. Only the last one can be repeated, for example after a failed step.
        """
        if number == self._number + 1:
            self._number, self._z = number, torch.randn(self._shape, generator=self._generator)
        assert number == self._number, "the draws of a generator have an order"
        return self._z


def torch_noise(seed: int, plan: PipelinePlan, image_shape: tuple[int, int, int]) -> Tensor:
    """Returns the noise of one image: that of the first x_t and of each step, (1 + num_steps, C, H, W) float32.

    Steps that add no noise draw none. They have zeros.
    """
    noise, is_drawn = TorchNoise(seed, image_shape), [True, *(plan.rows[:, COLUMN_OF_S] != 0).tolist()]
    numbers = [sum(is_drawn[:step]) for step in range(len(is_drawn))]
    zeros = torch.zeros(1, *image_shape)
    return torch.cat([noise.draw(k) if drawn else zeros for k, drawn in zip(numbers, is_drawn, strict=True)])


@torch.inference_mode()
def run_plan(network: PipelineNetwork, plan: PipelinePlan, noise: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x_t before the first step and after each step, with the image that is shown after that step.

    Both are (B, C, H, W). `noise` is (1 + num_steps, B, C, H, W) and y is (B,). The image is 0 before the first step.
    """
    x_t, image = noise[0] * plan.start, torch.zeros_like(noise[0])
    yield x_t, image
    for row, z in zip(plan.rows, noise[1:], strict=True):
        rows = row.expand(len(y), -1)  # (B, 13)
        u, x_0 = clipped_x_0(x_t, network(x_t, rows[:, 0], y), rows)
        x_t, image = pipeline_step(x_t, image, u, x_0, z, rows)
        yield x_t, image
