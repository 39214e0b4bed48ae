"""The forward process and what training asks of the network (Ho 2020)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model.prediction import Prediction, PredictionConfig
from model.schedule import Schedule

Tensors = tuple[Tensor, ...] | list[Tensor]


class Diffusion:
    """Adds noise, draws timesteps and states the loss; draws all of it from one generator, so a seed repeats it.

    `prediction` is what the network predicts, eps by default; `min_snr_gamma` weights the loss (0 = not).
    """

    def __init__(
        self,
        schedule: Schedule,
        generator: torch.Generator,
        prediction: Prediction | None = None,
        min_snr_gamma: float = 0.0,
    ) -> None:
        self.generator = generator
        self.prediction = prediction or Prediction(PredictionConfig(), schedule)
        weights = (
            self.prediction.min_snr_weights(min_snr_gamma) if min_snr_gamma else torch.ones_like(schedule.alpha_bar)
        )
        self.weights = weights.float().to(generator.device)  # (T + 1,)
        self.num_steps = schedule.num_steps
        self.alpha_bar = schedule.alpha_bar.float().to(generator.device)  # (T + 1,)

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_0 (B, C, H, W) in [-1, 1], t (B,) in 0..T -> x_t and the noise eps in it (Ho 2020, eq. 4)."""
        if eps is None:
            eps = torch.randn(x_0.shape, generator=self.generator, device=x_0.device)
        alpha_bar_t = self.alpha_bar[t][:, None, None, None]  # (B, 1, 1, 1)
        x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps  # (B, C, H, W)
        return x_t, eps

    def draw_timesteps(self, num_rows: int) -> Tensor:
        """A random t in 1..T for each row, (num_rows,)."""
        return torch.randint(1, self.num_steps + 1, (num_rows,), generator=self.generator, device=self.generator.device)

    def draw_label_mask(self, num_rows: int, drop_probability: float) -> Tensor:
        """True where the row's label is dropped, (num_rows,); whole labels, never parts of their embedding."""
        draws = torch.rand(num_rows, generator=self.generator, device=self.generator.device)
        return draws < drop_probability

    def train_step(
        self,
        denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
        x_0: Tensor,
        y: Tensor,
        c_mask: Tensor,
        null_label: int,
    ) -> Tensor:
        """The mean squared error of what is predicted at a random t per image (Ho 2020, eq. 14), a scalar.

        x_0 (B, C, H, W); y (B,) integer labels, those under c_mask (B,) replaced by `null_label`.
        """
        t = self.draw_timesteps(len(x_0))  # (B,)
        x_t, eps = self.add_noise(x_0, t)
        output = denoiser(x_t, t, torch.where(c_mask, null_label, y))
        return self.errors(output.float(), x_0, eps, t).mean()

    def errors(self, output: Tensor, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Each row's squared error, weighted, (B,), for an output (B, C, H, W) at timesteps t (B,)."""
        target = self.prediction.target(x_0, eps, t)  # (B, C, H, W)
        return self.weights[t] * (output - target).square().mean(dim=(1, 2, 3))


def ema_decay(step: int, max_decay: float) -> float:
    """Returns the decay of the running average at this step, where 1 is the first step.

    1 - (1 + step)^(-2/3) forgets the random start within a few steps and still averages over a growing share of a run.
    """
    return min(max_decay, 1 - (1 + step) ** (-2 / 3))


def running_average(max_decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Returns an averaging function for `torch.optim.swa_utils.AveragedModel`: an EMA whose decay is `ema_decay`.

    The step is the number of networks that the model has averaged so far.
    """

    def update(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        get_ema_multi_avg_fn(ema_decay(int(num_averaged), max_decay))(averaged, current, num_averaged)

    return update
