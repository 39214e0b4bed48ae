"""The adversary of a distillation: a discriminator that learns to tell the student's images from real ones.

The loss compares a generated image with a real one of the same class (the relativistic pairs of Huang 2024, arXiv
2501.05441), so that every real image counts and no class is neglected. The discriminator's score may change only a
little where noise is added to an image. This approximates the gradient penalties R1 and R2 (as Lin 2025, arXiv
2501.08316, does for R1) without second derivatives, which a compiled step could not compute.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.unet import UNetConfig
from scripts.training.recipe import AdversaryRecipe

BETAS = (0.0, 0.99)  # as usual for a GAN: the loss changes with every step of the student, so momentum would mislead
SLOPE = 0.2  # of the leaky ReLU
PENALTY_STD = 0.05  # standard deviation of the noise of the penalty, for pixels in [-1, 1]
PENALTY_PART = 4  # every fourth image has the penalty, which saves a third of the time


class Discriminator(nn.Module):
    """Images (B, C, H, W), the timestep t of the student's step (B,) and labels y (B,) -> scores (B,).

    A higher score means more real. The score of a class and a timestep is a projection of the features (Miyato & Koyama
    2018). There is no normalisation, because it would mix what the penalty measures for each image.
    """

    def __init__(self, unet: UNetConfig, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(unet.image_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(
            _Residual(width, width),
            nn.AvgPool2d(2),
            _Residual(width, 2 * width),
            _Residual(2 * width, 2 * width),
            nn.AvgPool2d(2),
            _Residual(2 * width, 4 * width),
            _Residual(4 * width, 4 * width),
        )
        side = unet.image_size // 4
        # Each channel is weighted by position, because a stroke in a wrong place is wrong.
        self.pool = nn.Conv2d(4 * width, 4 * width, side, groups=4 * width)
        self.score = nn.Linear(4 * width, 1)
        self.class_embed = nn.Embedding(unet.num_classes, 4 * width)
        self.time_embed = nn.Embedding(unet.num_steps + 1, 4 * width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the scores, (B,) float32."""
        h = F.leaky_relu(self.blocks(self.stem(x)), SLOPE)  # (B, 4 width, H / 4, W / 4)
        h = F.leaky_relu(self.pool(h).flatten(1), SLOPE)  # (B, 4 width)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # the penalty divides differences of scores by a small number
            return self._score_of(h.float(), t, y)

    def _score_of(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        asked = self.class_embed(y) + self.time_embed(t)  # (B, 4 width)
        return self.score(h)[:, 0] + (asked * h).sum(dim=1) / math.sqrt(h.shape[1])


class _Residual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        for parameter in self.second.parameters():  # so that the untrained block is its shortcut
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        h = self.first(F.leaky_relu(x, SLOPE))
        return self.shortcut(x) + self.second(F.leaky_relu(h, SLOPE))


class Adversary:
    """The discriminator with its optimizer. `learn` makes it better, `loss` says how the student can deceive it."""

    def __init__(
        self,
        recipe: AdversaryRecipe,
        unet: UNetConfig,
        generator: torch.Generator,
        *,
        bfloat16: bool,
        compiled: bool,
        capturable: bool,
    ) -> None:
        self.recipe = recipe
        self._generator = generator
        device = generator.device
        self.network = Discriminator(unet, recipe.width).to(device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=recipe.lr, betas=BETAS, fused=True, capturable=capturable
        )
        self._bfloat16 = bfloat16
        self._scores: Callable[[Tensor, Tensor, Tensor], Tensor] = (
            torch.compile(self.network, dynamic=False) if compiled else self.network
        )

    def learn(self, real: Tensor, generated: Tensor, t: Tensor, y: Tensor) -> None:
        """Takes one step of the optimizer. Images are (B, C, H, W), the timesteps t and the labels y (B,)."""
        images = torch.cat([real, generated.detach()])  # (2B, C, H, W)
        few = images[::PENALTY_PART]
        z = torch.randn(few.shape, generator=self._generator, device=few.device)
        t, y = t.repeat(2), y.repeat(2)  # (2B,)
        scores = self._score(
            torch.cat([images, few + PENALTY_STD * z]),
            torch.cat([t, t[::PENALTY_PART]]),
            torch.cat([y, y[::PENALTY_PART]]),
        )
        of_real, of_generated, of_noisy = scores.split([len(real), len(real), len(few)])
        slope = (of_noisy - scores[: len(images) : PENALTY_PART]) / PENALTY_STD
        loss = F.softplus(of_generated - of_real).mean() + self.recipe.gradient_weight * slope.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def loss(self, real: Tensor, generated: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of the student: low if its images have higher scores than the real ones of the same class.

        The gradients flow only into `generated`.
        """
        self.network.requires_grad_(False)
        both = self._score(torch.cat([real, generated]), t.repeat(2), y.repeat(2))  # (2B,)
        self.network.requires_grad_(True)
        of_real, of_generated = both.chunk(2)
        return F.softplus(of_real - of_generated).mean()

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights and the state of the optimizer."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        capturable = self.optimizer.param_groups[0]["capturable"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["capturable"] = capturable

    def _score(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bfloat16):
            return self._scores(x.contiguous(memory_format=torch.channels_last), t, y)
