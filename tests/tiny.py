"""Tiny networks for tests, and an ideal denoiser with a closed-form solution."""

from typing import Any

import torch
from torch import Tensor

from model.schedule import Schedule
from model.unet import UNet, UNetConfig

# The architecture of all tests that compile a step. Each further architecture costs most of a minute of compilation.
COMPILED: dict[str, Any] = {"image_size": 28}


def tiny_unet(seed: int = 0, **config: Any) -> UNet:
    """Returns a U-Net of two levels in evaluation mode.

    All weights are random, including those that training initialises with 0.
    """
    defaults: dict[str, Any] = {
        "image_size": 8,
        "num_classes": 10,
        "widths": (8, 16),
        "num_pairs": 1,
        "attention_heads": 2,
        "time_dim": 16,
        "embed_dim": 16,
    }
    network = UNet(UNetConfig(**defaults | config)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


class IdealDenoiser:
    """Predicts eps optimally for a data set that consists of a few labelled points.

    E[x_0 | x_t] is the mean of the points, weighted by the probability that each one became x_t (Karras 2022,
    eq. 57). This holds for every schedule. The null label selects all points. Computes in float64.
    """

    def __init__(self, points: Tensor, labels: Tensor, schedule: Schedule, null_label: int = 10) -> None:
        self.points = points.double()  # (N, C, H, W)
        self.labels, self.alpha_bar, self.null_label = labels, schedule.alpha_bar, null_label
        self.calls: list[tuple[Tensor, Tensor]] = []  # the t and y of each call

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((t, y))
        alpha_bar_t = self.alpha_bar[t][:, None]  # (B, 1)
        x = x_t.double().flatten(1)  # (B, D)
        points = self.points.flatten(1)  # (N, D)
        distance = (x[:, None] - alpha_bar_t[..., None].sqrt() * points).square().sum(dim=2)  # (B, N)
        allowed = (y[:, None] == self.null_label) | (y[:, None] == self.labels)  # (B, N)
        logits = (-distance / (2 * (1 - alpha_bar_t))).masked_fill(~allowed, -torch.inf)
        x_0 = logits.softmax(dim=1) @ points  # (B, D)
        eps = (x - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()
        return eps.reshape(x_t.shape)
