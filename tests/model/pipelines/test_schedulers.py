"""Compares the plans of pipelines with the schedulers of diffusers, for the same network, timesteps and noise."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from model.pipelines.schedulers import PipelinePlan, Scheduler, clipped_x_0, pipeline_step

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    import diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPE = (1, 3, 8, 8)
DDPM, DDIM, DPMPP, EULER = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
)
COSINE, ZERO_SNR = (
    {"beta_schedule": "squaredcos_cap_v2"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
)
UNCLIPPED: dict[str, dict[str, Any]] = {
    DDPM: {"clip_sample": False},
    DDIM: {"clip_sample": False},
    DPMPP: {},
    EULER: {},
}
# Every scheduler with every kind of prediction and every spacing of the timesteps, without clipping.
PLAIN: list[tuple[str, dict[str, Any]]] = [
    (name, UNCLIPPED[name] | {"prediction_type": prediction, "timestep_spacing": spacing})
    for name, prediction, spacing in itertools.product(
        UNCLIPPED, ("epsilon", "v_prediction", "sample"), ("leading", "trailing", "linspace")
    )
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    *((DDPM, {"variance_type": kind}) for kind in ("fixed_small", "fixed_small_log", "fixed_large")),
    (DDPM, {"variance_type": "fixed_large", "timestep_spacing": "trailing"}),
    (DDPM, COSINE),
    (DDPM, {"beta_schedule": "sigmoid"}),
    (DDPM, ZERO_SNR),
    (DDIM, {}),
    (DDIM, {"clip_sample_range": 2.0}),
    (DDIM, {"set_alpha_to_one": False, "steps_offset": 1}),
    (DDIM, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    (DDIM, ZERO_SNR),
    (DPMPP, {"use_karras_sigmas": True}),
    (DPMPP, {"use_lu_lambdas": True}),
    (DPMPP, {"use_exponential_sigmas": True}),
    (DPMPP, {"solver_order": 1}),
    (DPMPP, {"solver_type": "heun"}),
    (DPMPP, {"final_sigmas_type": "sigma_min"}),
    (DPMPP, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    (DPMPP, {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    (DPMPP, {**COSINE, "lambda_min_clipped": -5.1}),
    (DPMPP, ZERO_SNR),
    (EULER, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 50.0}),
    (EULER, {"use_exponential_sigmas": True}),
    (EULER, {"final_sigmas_type": "sigma_min"}),
    (EULER, {"steps_offset": 1, "timestep_spacing": "leading"}),
    (EULER, ZERO_SNR),
]


def network(x_t: Tensor, t: Tensor | float) -> Tensor:
    """A network of one formula. Its output depends on the image, its neighbours and the timestep of each row."""
    time = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
    return torch.tanh(0.7 * x_t + 0.2 * x_t.roll(1, dims=-1) + 0.4 * torch.sin(time / 90))


def step(x_t: Tensor, x_0_prev: Tensor, output: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return pipeline_step(x_t, x_0_prev, *clipped_x_0(x_t, output, rows), z, rows)


class Pair:
    """A scheduler of diffusers, the plan for it, and the loop of diffusers' pipelines."""

    def __init__(self, name: str, options: dict[str, Any], num_steps: int, **of_ddim: Any) -> None:
        self.theirs, self.of_ddim = getattr(diffusers, name)(**options), of_ddim
        config = {"_class_name": name, "_diffusers_version": diffusers.__version__, **self.theirs.config}
        self.plan: PipelinePlan = Scheduler(config, **of_ddim).plan(num_steps)
        self.theirs.set_timesteps(num_steps)
        self.is_euler = name == EULER

    def noises(self, seed: int) -> list[Tensor]:
        """Returns the noise of the first x_t and of each step, as diffusers draws it with a generator."""
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(SHAPE, generator=generator)]
        return draws + [
            torch.randn(SHAPE, generator=generator) if s else torch.zeros(SHAPE) for s in self.plan.rows[:, 4]
        ]

    def run_theirs(self, seed: int) -> list[Tensor]:
        """Returns x_t before each step and after the last one."""
        generator = torch.Generator().manual_seed(seed)
        x_t = torch.randn(SHAPE, generator=generator) * self.theirs.init_noise_sigma
        visited = [x_t]
        for t in self.theirs.timesteps:
            output = network(self.theirs.scale_model_input(x_t, t), t)
            more = {} if self.is_euler else {"generator": generator}
            x_t = self.theirs.step(output, t, x_t, **more, **self.of_ddim).prev_sample
            visited.append(x_t)
        if self.is_euler:  # it keeps x_t / alpha
            ratios = [*self.theirs.sigmas[:-1].tolist(), 0.0]
            visited = [x_t / math.hypot(1, ratio) for x_t, ratio in zip(visited, ratios, strict=True)]
        return visited

    def run_ours(self, seed: int, given: list[Tensor] | None = None) -> list[Tensor]:
        """Does the same with the plan. With `given`, each step starts from this x_t instead of its own."""
        first, *noises = self.noises(seed)
        visited, x_0 = [first * self.plan.start], torch.zeros(SHAPE)
        for k, (row, z) in enumerate(zip(self.plan.rows.split(1), noises, strict=True)):
            x_t = given[k] if given else visited[-1]
            x_t, x_0 = step(x_t, x_0, network(x_t, row[:, 0]), z, row)
            visited.append(x_t)
        return visited


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Returns the largest difference of two images, relative to the largest value if it is above 1."""
    return max(
        ((one - other).abs().max() / max(1.0, other.abs().max().item())).item()
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("num_steps", [10, 30, 50])
@pytest.mark.parametrize(("name", "options"), [*PLAIN, *OTHERS])
def test_each_step_equals_that_of_diffusers(name: str, options: dict[str, Any], num_steps: int) -> None:
    pair = Pair(name, options, num_steps)
    theirs = pair.run_theirs(seed=3)
    assert largest_difference(pair.run_ours(3, given=theirs), theirs) < 1e-5


@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_whole_path_equals_that_of_diffusers_without_clipping(
    name: str, options: dict[str, Any], num_steps: int
) -> None:
    pair = Pair(name, options, num_steps)
    assert largest_difference(pair.run_ours(4), pair.run_theirs(4)) < 1e-4


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("use_clipped_model_output", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_follows_the_options_of_its_pipeline(
    eta: float, use_clipped_model_output: bool, clip_sample: bool
) -> None:
    pair = Pair(DDIM, {"clip_sample": clip_sample}, 20, eta=eta, use_clipped_model_output=use_clipped_model_output)
    theirs = pair.run_theirs(5)
    assert largest_difference(pair.run_ours(5, given=theirs), theirs) < 1e-5


@pytest.mark.parametrize(
    ("name", "num_steps"), [(DDPM, 1000), (DDPM, 1), (DDIM, 1), (DDIM, 1000), (DPMPP, 1), (DPMPP, 2), (EULER, 1)]
)
def test_fewest_and_most_steps_equal_those_of_diffusers(name: str, num_steps: int) -> None:
    pair = Pair(name, {}, num_steps)
    theirs = pair.run_theirs(6)
    assert largest_difference(pair.run_ours(6, given=theirs), theirs) < 1e-5


def test_rows_of_different_schedulers_and_steps_have_the_same_bits_as_alone() -> None:
    plans = [Pair(name, UNCLIPPED[name], 10 + 3 * k).plan for k, name in enumerate(UNCLIPPED)]
    rows = torch.stack([plan.rows[3 * k] for k, plan in enumerate(plans)])  # (4, 13)
    generator = torch.Generator().manual_seed(0)
    x_t, x_0_prev, z = torch.randn(3, 4, *SHAPE[1:], generator=generator)
    given = (x_t, x_0_prev, network(x_t, rows[:, 0]), z, rows)
    together = step(*given)
    for k in range(4):
        alone = step(*(each[k : k + 1] for each in given))
        assert all(torch.equal(own[0], each[k]) for own, each in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "_class_name is 'PNDMScheduler'. Supported schedulers are DDPMScheduler, "),
        ({}, "_class_name is None"),
        ({"_class_name": ["DDPMScheduler"]}, "_class_name is ['DDPMScheduler']"),
        ({"_class_name": DDPM, "thresholding": True}, "thresholding is True. Supported is False"),
        (
            {"_class_name": DDPM, "variance_type": "learned_range"},
            "variance_type is 'learned_range'. Supported is None",
        ),
        ({"_class_name": DDPM, "num_train_timesteps": 10**9}, "num_train_timesteps must be 1 to 10000, got 1000000000"),
        ({"_class_name": DDPM, "num_train_timesteps": "9"}, "num_train_timesteps must be 1 to 10000, got '9'"),
        ({"_class_name": DDPM, "wavelets": 1}, "wavelets is unknown to the installed diffusers"),
        ({"_class_name": DPMPP, "solver_order": 3}, "solver_order is 3. Supported is 1 or 2"),
        ({"_class_name": DPMPP, "algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-dpmsolver++'"),
        ({"_class_name": DPMPP, "prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"_class_name": DDPM, "beta_start": "low"}, "DDPMScheduler does not accept the configuration: "),
        (
            {"_class_name": DDPM, "beta_schedule": "steep"},
            "DDPMScheduler does not accept the configuration: steep is no",
        ),
        ({"_class_name": DDPM, "trained_betas": [0.1, 0.2]}, "trained_betas has the shape (2,), but num_train"),
        (
            {"_class_name": EULER, "timestep_type": "continuous"},
            "timestep_type is 'continuous'. Supported is",
        ),
        ({"_class_name": DDPM, "beta_end": 2.5}, "the betas must be above 0 and at most 1, so that"),
        ({"_class_name": DDPM, "beta_start": -0.1}, "the betas must be above 0"),
        ({"_class_name": DDPM, "beta_end": math.nan}, "the betas must be above 0"),
        ({"_class_name": EULER, "interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
    ],
)
def test_configuration_without_a_plan_is_refused_with_its_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        Scheduler(config)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "num_steps", "message"),
    [
        ({"_class_name": DDPM}, 0, "num_steps must be 1 to 1000, got 0"),
        ({"_class_name": DDPM, "num_train_timesteps": 50}, 51, "num_steps must be 1 to 50, got 51"),
        (
            {"_class_name": DDIM, **ZERO_SNR, "prediction_type": "epsilon"},
            10,
            "the first timestep has no signal",
        ),
        (
            {"_class_name": DDPM, "timestep_spacing": "random"},
            10,
            "DDPMScheduler has no timesteps for 10 steps: random",
        ),
        ({"_class_name": DDPM, "steps_offset": 10**6}, 10, "DDPMScheduler has no plan for num_steps 10"),
        (
            {"_class_name": DDIM, "clip_sample_range": None},
            10,
            "DDIMScheduler has no plan for its configuration: '>' not supported",
        ),
        (
            {"_class_name": DDPM, "clip_sample_range": -1.0},
            10,
            "DDPMScheduler has no plan for its configuration",
        ),
        # diffusers makes one timestep more than was asked for.
        ({"_class_name": DDPM, "timestep_spacing": "trailing"}, 61, "DDPMScheduler has no plan for num_steps 61"),
        (
            {"_class_name": DPMPP, "timestep_spacing": "trailing"},
            61,
            "DPMSolverMultistepScheduler has no plan for",
        ),
        (
            {"_class_name": EULER, "timestep_spacing": "trailing"},
            61,
            "EulerDiscreteScheduler has no plan for num",
        ),
        ({"_class_name": DPMPP}, 1000, "DPMSolverMultistepScheduler has no plan for num_steps 1000"),
        (
            {"_class_name": DPMPP, **COSINE, "use_karras_sigmas": True},
            10,
            "DPMSolverMultistepScheduler has no plan for",
        ),
    ],
)
def test_number_of_steps_without_a_plan_is_refused(config: dict[str, Any], num_steps: int, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        Scheduler(config).plan(num_steps)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", [DDPM, DDIM, DPMPP, EULER])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 5])
def test_every_number_of_steps_either_has_a_plan_or_is_known_to_have_none(name: str, spacing: str, offset: int) -> None:
    config = {"_class_name": name, "num_train_timesteps": 60, "timestep_spacing": spacing, "steps_offset": offset}
    if name == DPMPP and offset == 5:
        config["final_sigmas_type"] = "sigma_min"
    scheduler, found = Scheduler(config), 0
    for num_steps in range(1, 61):
        if scheduler.has_plan(num_steps):
            plan = scheduler.plan(num_steps)
            found += 1
            assert (plan.num_steps, plan.rows[:, -1].tolist()) == (num_steps, [0.0] * (num_steps - 1) + [1.0])
        else:
            with pytest.raises(ValueError, match=r"has no (plan|timesteps) for"):
                scheduler.plan(num_steps)
    assert found >= 20
