"""Networks small enough for tests, and a denoiser whose answers are known in closed form."""

from typing import Any

import torch
from torch import Tensor

from model.schedule import Schedule
from model.unet import UNet, UNetConfig


def tiny_unet(seed: int = 0, **config: Any) -> UNet:
    """A U-Net of two levels with random weights, those that training starts at zero too; in evaluation mode."""
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
    """The best possible prediction of eps when the data are nothing but a few labelled points.

    E[x_0 | x_t] is then a mean of the points weighted by how likely each is to have become x_t
    (Karras 2022, eq. 57), whatever the schedule. The null label stands for all points. Computed in float64.
    """

    def __init__(self, points: Tensor, labels: Tensor, schedule: Schedule, null_label: int = 10) -> None:
        self.points = points.double()  # (N, C, H, W)
        self.labels, self.alpha_bar, self.null_label = labels, schedule.alpha_bar, null_label
        self.calls: list[tuple[Tensor, Tensor]] = []  # t and y of each call

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
