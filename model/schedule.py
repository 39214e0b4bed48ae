"""The noise schedule alpha_bar_t, and the timesteps that a sampler visits.

This module does not import torch. Only `Schedule(config)` does, when it computes alpha_bar. Another library would round
some values differently, and then an old seed could give other images.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

COSINE_OFFSET = 0.008  # the offset s of Nichol & Dhariwal 2021, eq. 17
MAX_BETA = 0.999  # limit of beta, section 3.2 of the same paper; avoids a division by zero at the last step
MIN_ALPHA_BAR = 1e-70  # far below it, the square root is 0 in float32, and samplers divide by it
# The first step of DPM-Solver++ goes from T to this half of the log-SNR if T is far below it: a cosine schedule has
# -7.6 at T = 100. A step of second order from there would make the solver diverge.
FIRST_HALF_LOG_SNR = -3.5


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Parameters of the noise schedule. They are stored in the checkpoint. Raises ValueError for invalid values."""

    kind: str = "cosine"  # "cosine" or "linear"
    num_steps: int = 100  # T
    beta_start: float = 1e-3  # linear only; 10 times the values of Ho 2020, which are for T = 1000
    beta_end: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear"):
            raise ValueError(f"unknown schedule kind {self.kind!r}: must be linear or cosine")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas must satisfy 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}"
            )


class Schedule:
    """The noise schedule alpha_bar_t for t = 0..T. t = 0 is the clean image, with alpha_bar_0 = 1.

    The linear kind is that of DDPM (Ho 2020, eq. 4 and section 4), the cosine kind that of Nichol & Dhariwal 2021,
    eq. 17. Raises ValueError if the values of alpha_bar are too small or too close together for the samplers.
    """

    def __init__(self, given: "ScheduleConfig | Tensor") -> None:
        """`given` are the parameters, or the values of alpha_bar, (T + 1,) float64."""
        self.alpha_bar = _alpha_bar(given) if isinstance(given, ScheduleConfig) else given  # (T + 1,) float64
        if self.alpha_bar[-1] < MIN_ALPHA_BAR:
            raise ValueError(
                f"the schedule adds too much noise: alpha_bar must be at least {MIN_ALPHA_BAR:g}, but ends at "
                f"{self.alpha_bar[-1]:g}"
            )
        if not (self.half_log_snr.diff() < 0).all():
            raise ValueError("the schedule adds too little noise: alpha_bar must decrease in every step")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.alpha_bar.equal(other.alpha_bar)

    def __hash__(self) -> int:
        return hash(self.num_steps)

    @property
    def num_steps(self) -> int:
        """T, the number of steps of the forward process."""
        return len(self.alpha_bar) - 1

    @property
    def half_log_snr(self) -> "Tensor":
        """lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)), (T + 1,) float64. It is infinite at t = 0."""
        return 0.5 * (self.alpha_bar / (1 - self.alpha_bar)).log()

    def signal_and_noise(self, t: int) -> tuple[float, float]:
        """Returns sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t): x_t = signal x_0 + noise eps (Ho 2020, eq. 4)."""
        alpha_bar = self.alpha_bar[t].item()
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def even_timesteps(self, num_steps: int, start: int | None = None) -> list[int]:
        """Returns num_steps + 1 decreasing timesteps from `start` (default: T) to 0, evenly spaced in t.

        Raises ValueError if num_steps is not in 1..start.
        """
        highest = self._check(num_steps, start)
        return [round(highest * i / num_steps) for i in range(num_steps, -1, -1)]

    def log_snr_timesteps(self, num_steps: int, start: int | None = None) -> list[int]:
        """Returns num_steps + 1 decreasing timesteps that end with 0 and are evenly spaced in log-SNR.

        They begin at `start` (default: T). This is the spacing of DPM-Solver (Lu 2022, section 3.3), rounded to integer
        timesteps. A longer first step goes to FIRST_HALF_LOG_SNR. The path does not start there, because x_t would have
        to be pure noise, but already has a little of the mean image, so that all images would get too bright. Near
        t = 0 several grid points have the same nearest timestep. Such timesteps are moved by the smallest amount that
        makes all distinct. Raises ValueError if num_steps is not in 1..start.
        """
        highest = self._check(num_steps, start)
        half_log_snr = self.half_log_snr[1 : highest + 1]  # (start,) t = 1..start
        first, last = half_log_snr[-1].item(), half_log_snr[0].item()
        grid, even = [], num_steps  # the number of points that are evenly spaced
        if num_steps > 2 and FIRST_HALF_LOG_SNR - first > (last - FIRST_HALF_LOG_SNR) / (num_steps - 2):
            grid, even, first = [first], num_steps - 1, FIRST_HALF_LOG_SNR
        grid += [first + (last - first) * k / max(even - 1, 1) for k in range(even)]
        distances = (half_log_snr.new_tensor(grid)[:, None] - half_log_snr).abs()  # (num_steps, start)
        nearest = distances.argmin(dim=1) + 1  # (num_steps,)
        timesteps: list[int] = []
        for remaining, t in zip(range(num_steps, 0, -1), nearest.tolist(), strict=True):
            timesteps.append(min(max(t, remaining), highest))
            highest = timesteps[-1] - 1
        return [*timesteps, 0]

    def _check(self, num_steps: int, start: int | None) -> int:
        """Returns the start of a path with `num_steps` steps."""
        highest = self.num_steps if start is None else start
        if not 1 <= highest <= self.num_steps:
            raise ValueError(f"start must be 1 to {self.num_steps}, got {highest}")
        if not 1 <= num_steps <= highest:
            raise ValueError(f"num_steps must be 1 to {highest}, got {num_steps}")
        return highest


def _alpha_bar(config: ScheduleConfig) -> "Tensor":  # (T + 1,) float64
    import torch

    T = config.num_steps
    if config.kind == "linear":
        beta = torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float64)  # (T,)
    else:
        u = torch.arange(T + 1, dtype=torch.float64) / T  # (T + 1,)
        f = torch.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2  # (T + 1,)
        beta = (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)  # (T,)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])
