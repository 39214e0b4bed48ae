"""The forward process and the training loss (Ho 2020), and the moving average of the weights."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model.prediction import Prediction, PredictionConfig
from model.schedule import Schedule

Tensors = tuple[Tensor, ...] | list[Tensor]


class Diffusion:
    """Adds noise, draws random timesteps and computes the training loss.

    All random numbers come from one generator, so a run with the same seed is repeatable. `prediction` is the target of
    the network (default: eps). `min_snr_gamma` sets the loss weighting of Hang 2023; 0 turns it off. No weight is below
    `min_weight`: the weights of Hang 2023 go to 0 near t = T, so a network trained with them alone never learns there.

    `overshoot_weight` is the weight of an error that makes a black pixel darker than black, or a white one brighter
    than white. Samplers clip such a prediction, so it does no harm. With a weight below 1, the network learns to
    predict black beyond the limit, and its small errors no longer leave faint specks in a black background.
    """

    def __init__(
        self,
        schedule: Schedule,
        generator: torch.Generator,
        prediction: Prediction | None = None,
        min_snr_gamma: float = 0.0,
        min_weight: float = 0.0,
        overshoot_weight: float = 1.0,
    ) -> None:
        self.generator = generator
        self.prediction = (prediction or Prediction(PredictionConfig(), schedule)).to(generator.device)
        weights = (
            self.prediction.min_snr_weights(min_snr_gamma) if min_snr_gamma else torch.ones_like(schedule.alpha_bar)
        )
        self.weights = weights.float().clamp(min=min_weight).to(generator.device)  # (T + 1,)
        self.overshoot_weight = overshoot_weight
        self.num_steps = schedule.num_steps
        self.alpha_bar = schedule.alpha_bar.float().to(generator.device)  # (T + 1,)

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns x_t and its noise eps, (B, C, H, W) each (Ho 2020, eq. 4).

        x_0 is (B, C, H, W) in [-1, 1] and t is (B,) in 0..T. A random eps is drawn if none is given.
        """
        if eps is None:
            eps = torch.randn(x_0.shape, generator=self.generator, device=x_0.device)
        alpha_bar_t = self.alpha_bar[t][:, None, None, None]  # (B, 1, 1, 1)
        x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps  # (B, C, H, W)
        return x_t, eps

    def draw_timesteps(self, num_rows: int) -> Tensor:
        """Returns a uniformly random t in 1..T for each row, (num_rows,)."""
        return torch.randint(1, self.num_steps + 1, (num_rows,), generator=self.generator, device=self.generator.device)

    def draw_label_mask(self, num_rows: int, drop_probability: float) -> Tensor:
        """Returns a random mask (num_rows,), True where the label is dropped (Ho & Salimans 2022, algorithm 1)."""
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
        """Returns the training loss at a random t for each row: the weighted mean squared error (Ho 2020, eq. 14).

        x_0 is (B, C, H, W) in [-1, 1], y (B,) has integer labels, and c_mask (B,) is True where the label is replaced
        by `null_label`. The result is a scalar.
        """
        t = self.draw_timesteps(len(x_0))  # (B,)
        x_t, eps = self.add_noise(x_0, t)
        output = denoiser(x_t, t, torch.where(c_mask, null_label, y))
        return self.errors(output.float(), x_0, eps, t).mean()

    def errors(self, output: Tensor, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Returns the weighted mean squared error of each row, (B,), for an output (B, C, H, W) at timesteps t (B,)."""
        error = output - self.prediction.target(x_0, eps, t)  # (B, C, H, W)
        squared = error.square()
        if self.overshoot_weight != 1:
            # x_0 falls if the output rises, so the prediction overshoots x_0 = 1 if the error is negative.
            is_beyond = (x_0.abs() == 1) & (error * x_0 < 0)
            squared = torch.where(is_beyond, self.overshoot_weight * squared, squared)
        return self.weights[t] * squared.mean(dim=(1, 2, 3))


def ema_decay(step: int, max_decay: float) -> float:
    """Returns the decay of the moving average (EMA) at this step. The first step is 1.

    The decay is 1 - (1 + step)^(-2/3), at most `max_decay`. It is small at first, so the random initial weights are
    forgotten within a few steps, and it grows, so the average later covers many steps.
    """
    return min(max_decay, 1 - (1 + step) ** (-2 / 3))


def running_average(max_decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Returns an averaging function for `torch.optim.swa_utils.AveragedModel`: an EMA with the decay of `ema_decay`.

    The step is the number of updates of the averaged model so far.
    """

    def update(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        get_ema_multi_avg_fn(ema_decay(int(num_averaged), max_decay))(averaged, current, num_averaged)

    return update
