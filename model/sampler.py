"""Samplers for the reverse process. Rows of one batch can have different steps, samplers and guidance.

Each step of each sampler is x_prev = a x_t + b x_0 + c x_0_prev + s z, with fresh noise z. The coefficients a, b, c and
s depend on the schedule only. A plan holds the coefficients of all steps.

A plan can follow any path of timesteps. It can start below T, and it can go up again: RePaint (Lugmayr 2022) adds noise
to a partly denoised image and denoises it again. The process "forward" has no reverse steps. In each step it
draws x_t from the forward process, at any timestep. The process "noisy" does the same for an image with noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from model.noise import normal
from model.paths import decreasing_runs, noise_above, noise_variance, step_timesteps, timesteps_of
from model.prediction import Prediction, PredictionConfig, predict_x_0
from model.schedule import Schedule
from model.spec import SAMPLERS, Guidance, Process, Sampler

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t, y) -> eps or another prediction
Coefficients = tuple[float, float, float, float]  # a, b, c and s of one step
PLAN_COLUMNS, COLUMN_OF_B, COLUMN_OF_S = 7, 2, 4  # of `Plan.table`


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one process. Step k goes from timesteps[k] to timesteps[k + 1]."""

    timesteps: tuple[int, ...]  # num_steps + 1 values
    coefficients: Tensor  # (num_steps, 4) float32: a, b, c, s
    # (num_steps, 2) float32: the error of a step compares the predicted x_0 with of_known known + of_x_t x_t.
    targets: Tensor | None = None  # None: of_known = 1 and of_x_t = 0, so x_0 is compared with the known pixels

    def table(self, device: torch.device) -> Tensor:
        """Returns t, a, b, c, s, of_known and of_x_t of each step, (num_steps, 7) float32."""
        t = torch.tensor(self.timesteps[:-1])[:, None]  # (num_steps, 1)
        targets = torch.tensor([1.0, 0.0]).expand(self.num_steps, 2) if self.targets is None else self.targets
        return torch.cat([t, self.coefficients, targets], dim=1).to(device)

    @property
    def start(self) -> float:
        """The first x_t is the noise multiplied by this number."""
        return 1.0

    @property
    def num_steps(self) -> int:
        """The number of steps. Each step calls the network once, or twice if guidance is applied."""
        return len(self.timesteps) - 1


def make_plan(schedule: Schedule, sampler: Sampler, num_steps: int) -> Plan:
    """Returns the plan of a sampler for `num_steps` steps from T to 0.

    Raises ValueError if the sampler is unknown or num_steps is not in 1..T.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: must be one of {', '.join(SAMPLERS)}")
    return plan_through(schedule, sampler, timesteps_of(schedule, sampler, num_steps))


def plan_through(schedule: Schedule, process: Process, path: Sequence[int]) -> Plan:
    """Returns the plan for a path of timesteps. Raises ValueError for an unknown process or an invalid path.

    A sampler takes one step, with one call of the network, from each timestep of the path to the next lower one. Where
    the path goes up, the step before also adds the noise of the forward process, so going up needs no call. Example:
    the path 100, 50, 80, 0 has a step from 100 to 50 and on to 80, and a step from 80 to 0. For the process "forward"
    every step draws x at the next timestep from q(x_t | x_0), in any order of timesteps. For "noisy" see `_noisy_plan`.
    """
    if process == "noisy":
        return _noisy_plan(schedule, path)
    alpha_bar = schedule.alpha_bar.tolist()  # floats, because tensors of one value are slow
    if process == "forward":
        rows = [_forward_coefficients(alpha_bar[t]) for t in path[1:]]
        return _plan(path, rows)
    if process not in SAMPLERS:
        raise ValueError(f"unknown sampler {process!r}: must be one of {', '.join(SAMPLERS)}")
    half_log_snr = schedule.half_log_snr.tolist() if process == "dpmpp" else []
    runs, rows = decreasing_runs(path), []
    for run, next_run in zip_longest(runs, runs[1:]):
        if process == "dpmpp":
            rows += _dpmpp_coefficients(half_log_snr, alpha_bar, run)
        else:
            step = _ddpm_coefficients if process == "ddpm" else _ddim_coefficients
            rows += [step(alpha_bar[t], alpha_bar[t_prev]) for t, t_prev in pairwise(run)]
        if next_run:
            rows[-1] = _with_noise(rows[-1], alpha_bar[run[-1]], alpha_bar[next_run[0]])
    return _plan(step_timesteps(runs), rows)


def _noisy_plan(schedule: Schedule, path: Sequence[int]) -> Plan:
    """Returns the plan that visits the timesteps path[1:] with an image u that has the noise level of path[0].

    Each timestep has two steps: with x_t = signal u + noise n, and with -n instead of n. All pixels are known, and
    their values are u. The bound of Ho 2020, eq. 5, for log p(u | class) compares predictions of u, not of x_0. Let
    s_t^2 and s^2 be the variances of the noise in x_t / signal and in u, and gamma = s_t^2 - s^2. For Gaussian noise:

        E[u | x_t, class] = x_t / signal - gamma / s_t^2 (x_t / signal - x_0)
        u - E[u | x_t, class] = gamma / s_t^2 (target - x_0),  target = u + s^2 / gamma (u - x_t / signal)

    where x_0 is the prediction of the class. For s = 0, an image without noise, the target is u.
    """
    t_image, *timesteps = path
    variance = noise_variance(schedule, t_image)
    levels = [noise_above(schedule, t_image, t) for t in timesteps]
    rows, targets = [], []
    for t, (signal, _), (next_signal, next_noise) in zip(timesteps, levels, [*levels[1:], (1.0, 0.0)], strict=True):
        ratio = variance / (noise_variance(schedule, t) - variance)
        rows += [(-1.0, 2 * signal, 0.0, 0.0), (0.0, next_signal, 0.0, next_noise)]
        targets += [(1 + ratio, -ratio / signal)] * 2
    visited = [t for t in timesteps for _ in range(2)]
    return Plan((*visited, 0), torch.tensor(rows), torch.tensor(targets))


def _plan(timesteps: Sequence[int], rows: list[Coefficients]) -> Plan:
    return Plan(tuple(timesteps), torch.tensor(rows, dtype=torch.float64).float())


def _with_noise(coefficients: Coefficients, alpha_bar_t: float, alpha_bar_next: float) -> Coefficients:
    """Adds the forward process from a step's target t up to t_next (Lugmayr 2022, algorithm 1, line 10).

    The noise of both parts is Gaussian and independent, so one z with the sum of the variances replaces it.
    """
    a, b, c, s = coefficients
    alpha = alpha_bar_next / alpha_bar_t
    return math.sqrt(alpha) * a, math.sqrt(alpha) * b, math.sqrt(alpha) * c, math.sqrt(alpha * s**2 + 1 - alpha)


def _forward_coefficients(alpha_bar_next: float) -> Coefficients:
    """The forward process from x_0 to any timestep, Ho 2020, eq. 4."""
    return 0.0, math.sqrt(alpha_bar_next), 0.0, math.sqrt(1 - alpha_bar_next)


def _ddpm_coefficients(alpha_bar_t: float, alpha_bar_prev: float) -> Coefficients:
    """Ancestral sampling with the posterior q(x_prev | x_t, x_0) of Ho 2020, eq. 6 and 7, for steps of any length."""
    alpha_t = alpha_bar_t / alpha_bar_prev
    a = math.sqrt(alpha_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    b = math.sqrt(alpha_bar_prev) * (1 - alpha_t) / (1 - alpha_bar_t)
    s = math.sqrt((1 - alpha_t) * (1 - alpha_bar_prev) / (1 - alpha_bar_t))  # is 0 at the last step
    return a, b, 0.0, s


def _ddim_coefficients(alpha_bar_t: float, alpha_bar_prev: float) -> Coefficients:
    """DDIM, Song 2021, eq. 12 with sigma_t = 0. eps is expressed in x_t and x_0."""
    a = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
    b = math.sqrt(alpha_bar_prev) - a * math.sqrt(alpha_bar_t)
    return a, b, 0.0, 0.0


def _dpmpp_coefficients(half_log_snr: list[float], alpha_bar: list[float], timesteps: list[int]) -> list[Coefficients]:
    """DPM-Solver++(2M), Lu 2022b, algorithm 2. The first and the last step, where h is infinite, have first order."""
    rows: list[Coefficients] = []
    h_before = None
    for t, t_prev in pairwise(timesteps):
        h = half_log_snr[t_prev] - half_log_snr[t]
        a = math.sqrt((1 - alpha_bar[t_prev]) / (1 - alpha_bar[t]))
        weight = -math.sqrt(alpha_bar[t_prev]) * math.expm1(-h)
        correction = 0.0 if h_before is None or t_prev == 0 else h / (2 * h_before)  # 1 / (2 r)
        rows.append((a, weight * (1 + correction), -weight * correction, 0.0))
        h_before = h
    return rows


def guide(cond: Tensor, uncond: Tensor, guidance_scale: Tensor) -> Tensor:
    """Returns the guided prediction (B, C, H, W) of classifier-free guidance. A scale of 1 turns guidance off.

    This is Ho & Salimans 2022, eq. 6 with w = guidance_scale - 1. guidance_scale broadcasts against (B, C, H, W). For a
    given x_t all prediction kinds are affine in eps, so the formula for eps applies to each of them.
    """
    return uncond + guidance_scale * (cond - uncond)


def check_null_label(null_label: int | None, guidance: Guidance) -> int:
    """Returns the label that means "no class". A network of N classes has N there, so no default fits all networks.

    Raises ValueError if the label is missing although guidance needs it.
    """
    if null_label is None and guidance.scale != 1:
        raise ValueError("guidance needs null_label, the label that means 'no class'")
    return null_label or 0


def reverse_step(x_t: Tensor, x_0: Tensor, x_0_prev: Tensor, z: Tensor, coefficients: Tensor) -> Tensor:
    """Returns x_prev of one step of any sampler. z is fresh noise. Images are (B, C, H, W), coefficients (B, 4)."""
    a, b, c, s = coefficients[:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
    return a * x_t + b * x_0 + c * x_0_prev + s * z


@torch.inference_mode()
def sample(  # noqa: PLR0913 # most are optional
    denoiser: Denoiser,
    schedule: Schedule,
    y: Tensor,
    *,
    seed: Tensor,
    index: Tensor,
    image_shape: tuple[int, int, int],
    sampler: Sampler = "ddpm",
    num_steps: int = 100,
    timesteps: list[int] | None = None,
    guidance: Guidance | None = None,
    prediction: Prediction | None = None,
    null_label: int | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Runs the complete reverse process with any denoiser. Returns x_0 (B, C, H, W) for y, seed and index (B,).

    `timesteps` replaces the timesteps that follow from `num_steps`; they must be decreasing and end with 0.
    `null_label`, the label that means "no class", is needed with guidance. `on_step(t, x_t, x_0)` is called with the
    input of each step and the predicted x_0. Raises ValueError for an unknown sampler, a num_steps out of range, or
    guidance without a null label.

    `model.process.draw` is the fast loop for a loaded checkpoint. This simple loop exists because training and the
    probe image of a checkpoint have only a network, and because tests use it as the reference for the fast loop.
    """
    guidance = guidance or Guidance()
    null = check_null_label(null_label, guidance)
    mix = (prediction or Prediction(PredictionConfig(), schedule)).table(y.device)  # (T + 1, 3)
    plan = plan_through(schedule, sampler, timesteps) if timesteps else make_plan(schedule, sampler, num_steps)
    coefficients = plan.coefficients.to(y.device)  # (num_steps, 4)
    x_t = normal(seed, index, torch.zeros_like(seed), image_shape)  # (B, C, H, W)
    x_0 = torch.zeros_like(x_t)
    for k, step_t in enumerate(plan.timesteps[:-1]):
        t = torch.full_like(y, step_t)  # (B,)
        output = denoiser(x_t, t, y)
        if guidance.acts_at(step_t):
            output = guide(output, denoiser(x_t, t, torch.full_like(y, null)), torch.tensor(guidance.scale))
        x_0_prev, x_0 = x_0, predict_x_0(x_t, output, mix[t])
        if on_step:
            on_step(step_t, x_t, x_0)
        z = normal(seed, index, torch.full_like(seed, k + 1), image_shape)
        x_t = reverse_step(x_t, x_0, x_0_prev, z, coefficients[k].expand(len(y), 4))
    return x_t
