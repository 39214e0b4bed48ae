"""The schedulers of diffusers as plans: the coefficients of all steps, so that each row of a call can have its own.

A scheduler of diffusers takes one timestep for a whole batch. All supported ones make steps of this form, with noise z,
the output F of the network, and coefficients that depend on the configuration and the number of steps only:

    u      = (skip x_t - scale F) / signal                  the predicted x_0
    x_0    = clamp(u, -clip, clip)
    x_prev = a x_t + b x_0 + c x_0_prev + s z + d u

Only DDIM uses d: the noise that it adds back is computed from the unclipped u, unless `use_clipped_model_output` is
set. The first five columns are those of `Plan` in model/sampler.py, so that both kinds of plans fit into one table.

Timesteps and noise levels are those of the scheduler of diffusers. Only the coefficients are computed here, with
float64. The level of x_t = alpha x_0 + sigma eps is a pair (alpha, sigma) with alpha^2 + sigma^2 = 1.
"""

import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.prediction import unclipped_x_0
from model.sampler import reverse_step

Level = tuple[float, float]  # alpha and sigma
# Keys of a configuration of which only these values are supported.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "interpolation_type": ("linear",),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "solver_order": (1, 2),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
}
MOST_TIMESTEPS = 10_000  # of a training


@dataclass(frozen=True, slots=True)
class StepOfPlan:
    """One step, from the timestep `t` of diffusers, which counts from 0. The module docstring has the equations."""

    t: float
    a: float
    b: float
    skip: float
    scale: float
    signal: float
    _: KW_ONLY
    c: float = 0.0
    s: float = 0.0
    of_known: float = 1.0  # the error of a step compares u with of_known known + of_x_t x_t, at known pixels
    of_x_t: float = 0.0
    d: float = 0.0
    clip: float = math.inf
    end: float = 0.0  # 1 in the last step: the result is x_prev, which can differ from x_0

    @property
    def row(self) -> list[float]:
        """The row of the table of plans."""
        return [getattr(self, name) for name in COLUMNS]


COLUMNS = ("t", "a", "b", "c", "s", "of_known", "of_x_t", "d", "skip", "scale", "signal", "clip", "end")
MIX = slice(COLUMNS.index("skip"), COLUMNS.index("signal") + 1)


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """The steps of a scheduler. `rows` is (num_steps, 13) float32, with the columns COLUMNS."""

    rows: Tensor
    start: float = 1.0  # the first x_t is the noise multiplied by this number

    @classmethod
    def of(cls, steps: Sequence[StepOfPlan], start: float = 1.0) -> "PipelinePlan":
        """Returns the plan with these steps."""
        return cls(torch.tensor([step.row for step in steps], dtype=torch.float64).float(), start)

    @property
    def num_steps(self) -> int:
        """The number of steps. Each calls the network once."""
        return len(self.rows)

    def table(self, device: torch.device) -> Tensor:
        """Returns `rows` on the device."""
        return self.rows.to(device)


class Scheduler:
    """A scheduler of diffusers that makes plans instead of steps."""

    def __init__(self, config: Mapping[str, Any], *, eta: float = 0.0, use_clipped_model_output: bool = False) -> None:
        """`config` is the content of scheduler_config.json. The other arguments are those of DDIMPipeline.

        Raises ValueError, with the key of the configuration, if it is not supported.
        """
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in _PLANS:
            raise ValueError(f"_class_name is {name!r}. Supported schedulers are {', '.join(_PLANS)}")
        _check_supported(config)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 to 1, got {eta}")
        num_timesteps = config.get("num_train_timesteps", 1000)
        if not isinstance(num_timesteps, int) or not 1 <= num_timesteps <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps must be 1 to {MOST_TIMESTEPS}, got {num_timesteps!r}")
        self.name, self.num_timesteps = name, num_timesteps
        self.eta, self.use_clipped_model_output = eta, use_clipped_model_output
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        self._own, unknown = _from_config(name, options)
        if unknown:
            raise ValueError(f"{min(unknown)} is unknown to the installed diffusers. Install a newer release of it")
        if self.betas.shape != (num_timesteps,):
            raise ValueError(
                f"trained_betas has the shape {tuple(self.betas.shape)}, but num_train_timesteps is {num_timesteps}"
            )
        if not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError("the betas must be above 0 and at most 1, so that the image loses signal in each timestep")

    @property
    def config(self) -> Any:
        """The complete configuration, with the defaults of diffusers: a mapping whose keys are attributes too."""
        return self._own.config

    @property
    def betas(self) -> Tensor:
        """The variance of the noise that each timestep of the training adds, (T,) float32."""
        betas: Tensor = self._own.betas
        return betas

    def replaced_by(self, name: str) -> "Scheduler":
        """Returns another scheduler for the same network, as `from_config(pipeline.scheduler.config)` does.

        Raises ValueError if it is not supported.
        """
        other = copy.copy(self)
        other.name, (other._own, _) = name, _from_config(name, self.config)
        _check_supported(other.config)
        return other

    def plan(self, num_steps: int) -> PipelinePlan:
        """Returns the plan for `num_steps` steps.

        Raises ValueError if num_steps is not in 1..T, or if the configuration has an invalid value.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"num_steps must be 1 to {self.num_timesteps}, got {num_steps}")
        making = self._prepared(num_steps)
        try:
            steps = _PLANS[self.name](making)
        except Exception as error:  # such as a TypeError for a value of a wrong type
            raise ValueError(f"{self.name} has no plan for its configuration: {error}".splitlines()[0]) from error
        if steps[0].signal == 0:
            raise ValueError("the first timestep has no signal, so prediction_type must be 'v_prediction' or 'sample'")
        return PipelinePlan.of([*steps[:-1], replace(steps[-1], end=1.0)], making._start())

    def has_plan(self, num_steps: int) -> bool:
        """Returns True if diffusers has valid timesteps for `num_steps` steps. It takes less than a millisecond."""
        try:
            return 1 <= num_steps <= self.num_timesteps and bool(self._prepared(num_steps))
        except ValueError:
            return False

    def _prepared(self, num_steps: int) -> "Scheduler":
        """Returns a copy that has the timesteps. Raises ValueError if there are none.

        It is a copy because a scheduler of diffusers changes during a run, and several threads make plans.
        """
        making = copy.copy(self)
        making._own = copy.deepcopy(self._own)
        try:
            making._own.set_timesteps(num_steps)
        except Exception as error:
            raise ValueError(f"{self.name} has no timesteps for {num_steps} steps: {error}".splitlines()[0]) from error
        timesteps, sigmas = making.timesteps, getattr(making._own, "sigmas", None)
        # diffusers itself fails in these cases: it has another number of steps, reads values after the end of its
        # tables, begins with the second of two equal timesteps, or divides by zero.
        is_wrong = len(timesteps) != num_steps or min(timesteps) < 0 or max(timesteps) > self.num_timesteps - 1
        if is_wrong or timesteps.count(timesteps[0]) > 1 or (sigmas is not None and not (sigmas[:-1].diff() < 0).all()):
            raise ValueError(f"{self.name} has no plan for num_steps {num_steps}. Use another number")
        return making

    @property
    def timesteps(self) -> list[float]:
        """The timesteps that `_prepared` has set, as diffusers counts them."""
        timesteps: list[float] = self._own.timesteps.tolist()
        return timesteps

    def alpha_bar(self, t: float, end: float = 1.0) -> float:
        """Returns the product of the alphas up to a timestep, or `end` before the first one."""
        return float(self._own.alphas_cumprod[int(t)]) if t >= 0 else end

    @property
    def levels(self) -> list[Level]:
        """The noise level before each step and after the last one, for schedulers that use sigma / alpha."""
        return [(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)) for ratio in map(float, self._own.sigmas)]

    def mix(self, level: Level) -> tuple[float, float, float]:
        """Returns skip, scale and signal, which give u, for the kind of prediction of the network."""
        alpha, sigma = level
        match self.config.prediction_type:
            case "epsilon":
                return 1.0, sigma, alpha
            case "v_prediction":
                return alpha, sigma, 1.0
        return 0.0, -1.0, 1.0

    @property
    def clip(self) -> float:
        """The largest magnitude of x_0. It is infinite if the scheduler does not clip. Raises ValueError."""
        if not self.config.clip_sample:
            return math.inf
        if not self.config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be above 0, got {self.config.clip_sample_range}")
        return float(self.config.clip_sample_range)

    def _start(self) -> float:
        """Returns the scale of the first x_t. The Euler scheduler keeps x_t / alpha, whose scale can differ from 1."""
        if self.name != "EulerDiscreteScheduler":
            return 1.0
        return float(self._own.init_noise_sigma) * self.levels[0][0]


def _check_supported(config: Mapping[str, Any]) -> None:
    for key, values in SUPPORTED.items():
        if key in config and config[key] not in values:
            shown = " or ".join(map(repr, values))
            raise ValueError(f"{key} is {config[key]!r}. Supported is {shown}")


def _from_config(name: str, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the scheduler of diffusers, and the options that it does not know."""
    kind = getattr(importlib.import_module("diffusers"), name)
    try:
        own, unknown = kind.from_config(config, return_unused_kwargs=True)
    except Exception as error:  # diffusers raises errors of many types for an invalid configuration
        raise ValueError(f"{name} does not accept the configuration: {error}".splitlines()[0]) from error
    return own, unknown


def _ddpm(scheduler: Scheduler) -> list[StepOfPlan]:
    """Ancestral sampling with the posterior q(x_prev | x_t, x_0), Ho 2020, eq. 6 and 7.

    1 - alpha_t has only a few correct digits in float32, in which diffusers computes it. It is rounded here in the same
    way, because otherwise a step of a plan with many steps would differ by up to 1e-4.
    """
    steps, is_large = [], scheduler.config.variance_type == "fixed_large"
    for t, t_prev in pairwise([*scheduler.timesteps, -1.0]):
        alpha_bar_t, alpha_bar_prev = scheduler.alpha_bar(t), scheduler.alpha_bar(t_prev)
        alpha_t = _float32(alpha_bar_t / alpha_bar_prev)
        beta_t, beta_bar_t, beta_bar_prev = (_float32(1 - each) for each in (alpha_t, alpha_bar_t, alpha_bar_prev))
        a = math.sqrt(alpha_t) * beta_bar_prev / beta_bar_t
        b = math.sqrt(alpha_bar_prev) * beta_t / beta_bar_t
        variance = beta_t if is_large else max(beta_bar_prev / beta_bar_t * beta_t, 1e-20)
        s = math.sqrt(variance) if t > 0 else 0.0
        mix = scheduler.mix((math.sqrt(alpha_bar_t), math.sqrt(beta_bar_t)))
        steps.append(StepOfPlan(t, a, b, *mix, s=s, clip=scheduler.clip))
    return steps


def _ddim(scheduler: Scheduler) -> list[StepOfPlan]:
    """DDIM, Song 2021, eq. 12 and 16. The last step ends at `final_alpha_cumprod`."""
    end, length = float(scheduler._own.final_alpha_cumprod), scheduler.num_timesteps // len(scheduler.timesteps)
    steps = []
    for t in scheduler.timesteps:
        alpha_bar_t, alpha_bar_prev = scheduler.alpha_bar(t), scheduler.alpha_bar(t - length, end)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
        s = scheduler.eta * math.sqrt(variance)
        a = math.sqrt(
            (1 - alpha_bar_prev - s**2) / (1 - alpha_bar_t)
        )  # of the direction, eps = (x_t - alpha x_0) / sigma
        of_direction, b = -a * math.sqrt(alpha_bar_t), math.sqrt(alpha_bar_prev)
        b, d = (b + of_direction, 0.0) if scheduler.use_clipped_model_output else (b, of_direction)
        mix = scheduler.mix((math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)))
        steps.append(StepOfPlan(t, a, b, *mix, s=s, d=d, clip=scheduler.clip))
    return steps


def _dpmpp(scheduler: Scheduler) -> list[StepOfPlan]:
    """DPM-Solver++ of order 1 or 2, Lu 2022b, algorithm 2, with the correction of the solver "midpoint" or "heun"."""
    config, levels, timesteps, steps = scheduler.config, scheduler.levels, scheduler.timesteps, list[StepOfPlan]()
    ends_in_first_order = (
        config.euler_at_final
        or config.final_sigmas_type == "zero"
        or (config.lower_order_final and len(timesteps) < 15)
    )
    h_before = math.nan
    for k, (t, (level, level_prev)) in enumerate(zip(timesteps, pairwise(levels), strict=True)):
        (_, sigma_t), (alpha_prev, sigma_prev) = level, level_prev
        h = _half_log_snr(level_prev) - _half_log_snr(level)
        is_last = k == len(timesteps) - 1
        is_first_order = config.solver_order == 1 or k == 0 or (is_last and ends_in_first_order)
        if is_first_order:
            correction = 0.0
        elif config.solver_type == "midpoint":
            correction = -0.5 * alpha_prev * math.expm1(-h) * h / h_before
        else:
            correction = alpha_prev * (math.expm1(-h) / h + 1) * h / h_before
        b = -alpha_prev * math.expm1(-h)
        mix = scheduler.mix(level)
        steps.append(StepOfPlan(t, sigma_prev / sigma_t, b + correction, *mix, c=-correction))
        h_before = h
    return steps


def _euler(scheduler: Scheduler) -> list[StepOfPlan]:
    """Euler's method for the probability flow, Karras 2022, algorithm 1, for x_t instead of x_t / alpha."""
    steps, levels = [], scheduler.levels
    for t, (level, level_prev) in zip(scheduler.timesteps, pairwise(levels), strict=True):
        (alpha_t, sigma_t), (alpha_prev, sigma_prev) = level, level_prev
        a = sigma_prev / sigma_t
        steps.append(StepOfPlan(t, a, alpha_prev - a * alpha_t, *scheduler.mix(level)))
    end, _ = levels[-1]  # the result is x_t / alpha
    steps[-1] = replace(steps[-1], a=steps[-1].a / end, b=steps[-1].b / end)
    return steps


def _float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def _half_log_snr(level: Level) -> float:
    alpha, sigma = level
    return math.log(alpha / sigma) if sigma else math.inf


_PLANS: dict[str, Callable[[Scheduler], list[StepOfPlan]]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpmpp,
    "EulerDiscreteScheduler": _euler,
}


def clipped_x_0(x_t: Tensor, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u and x_0, (B, C, H, W) each, for an output F (B, C, H, W) and rows (B, 13) of the table of plans."""
    clip = rows[:, COLUMNS.index("clip"), None, None, None]  # (B, 1, 1, 1)
    u = unclipped_x_0(x_t, output, rows[:, MIX])  # (B, C, H, W)
    return u, u.clamp(-clip, clip)


def pipeline_step(
    x_t: Tensor, x_0_prev: Tensor, u: Tensor, x_0: Tensor, z: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns x_prev and the image that is shown after the step, (B, C, H, W) each.

    The image is x_0, and x_prev after the last step. `rows` (B, 13) are rows of the table of plans.
    """
    d, is_last = (rows[:, COLUMNS.index(name), None, None, None] for name in ("d", "end"))  # (B, 1, 1, 1) each
    x_prev = reverse_step(x_t, x_0, x_0_prev, z, rows[:, 1:5]) + d * u  # (B, C, H, W)
    return x_prev, x_prev.where(is_last == 1, x_0)
