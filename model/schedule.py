"""The noise schedule: how much of the image is left at each step, and which steps a sampler visits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COSINE_OFFSET = 0.008  # s of Nichol & Dhariwal 2021, eq. 17
MAX_BETA = 0.999  # same paper, section 3.2: keeps the last step from dividing by zero
MIN_HALF_LOG_SNR = -5.1  # below it DPM-Solver++ on a cosine schedule diverges


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """What a schedule is made from; travels inside the checkpoint."""

    kind: str = "cosine"  # "cosine" or "linear"
    num_steps: int = 100  # T
    beta_start: float = 1e-3  # linear only: 1e-4 and 0.02, made for T = 1000, scaled to T = 100
    beta_end: float = 0.2

    def __post_init__(self) -> None:
        """ValueError for a schedule that cannot be made."""
        if self.kind not in ("cosine", "linear"):
            raise ValueError(f"unknown schedule kind {self.kind!r}: linear or cosine")
        if self.num_steps < 1:
            raise ValueError("num_steps must be at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("betas must rise between 0 and 1")


class Schedule:
    """alpha_bar_t for t = 0..T, with alpha_bar_0 = 1: the clean image needs no special case.

    DDPM (Ho 2020, eq. 4) for the linear kind; Nichol & Dhariwal 2021, eq. 17 for the cosine kind.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.alpha_bar = _alpha_bar(config)  # (T + 1,) float64

    @property
    def num_steps(self) -> int:
        """T, the number of steps from the image to pure noise."""
        return self.config.num_steps

    @property
    def half_log_snr(self) -> Tensor:
        """lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)), (T + 1,); infinite at t = 0."""
        return 0.5 * torch.log(self.alpha_bar / (1 - self.alpha_bar))

    def even_timesteps(self, num_steps: int) -> list[int]:
        """num_steps + 1 falling timesteps, T first and 0 last, evenly spaced in t."""
        self._check(num_steps)
        return [round(self.num_steps * i / num_steps) for i in range(num_steps, -1, -1)]

    def log_snr_timesteps(self, num_steps: int) -> list[int]:
        """num_steps + 1 falling timesteps, 0 last, each the nearest to an even grid of log-SNR.

        DPM-Solver (Lu 2022, section 3.3). Near t = 0 the grid is finer than the integers are,
        so each timestep gives way just as far as it must to keep all of them distinct.
        """
        self._check(num_steps)
        half_log_snr = self.half_log_snr[1:]  # (T,) t = 1..T
        start = max(half_log_snr[-1].item(), MIN_HALF_LOG_SNR)
        grid = torch.linspace(start, half_log_snr[0].item(), num_steps, dtype=torch.float64)  # (num_steps,)
        nearest = (grid[:, None] - half_log_snr).abs().argmin(dim=1) + 1  # (num_steps,)
        timesteps: list[int] = []
        highest = self.num_steps
        for remaining, t in zip(range(num_steps, 0, -1), nearest.tolist(), strict=True):
            timesteps.append(min(max(t, remaining), highest))
            highest = timesteps[-1] - 1
        return [*timesteps, 0]

    def _check(self, num_steps: int) -> None:
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"num_steps must be 1 to {self.num_steps}, got {num_steps}")


def _alpha_bar(config: ScheduleConfig) -> Tensor:
    T = config.num_steps
    if config.kind == "linear":
        beta = torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float64)  # (T,)
    else:
        u = torch.arange(T + 1, dtype=torch.float64) / T  # (T + 1,)
        f = torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2  # (T + 1,)
        beta = (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)  # (T,)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])
