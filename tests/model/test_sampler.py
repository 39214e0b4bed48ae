import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.noise import normal
from model.paths import noise_above
from model.prediction import KINDS, Prediction, PredictionConfig
from model.sampler import guide, make_plan, plan_through, reverse_step, sample
from model.schedule import Schedule, ScheduleConfig
from model.spec import SAMPLERS, Guidance, Sampler
from tests.tiny import IdealDenoiser

SHAPE = (1, 4, 4)
SCHEDULES = {kind: Schedule(ScheduleConfig(kind=kind)) for kind in ("cosine", "linear")}
COSINE = SCHEDULES["cosine"]
EVERY_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


BETAS = st.floats(min_value=-60, max_value=0).map(lambda exponent: 2.0**exponent) | st.floats(1e-9, 1)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(("linear", "cosine")), st.integers(1, 400), BETAS, BETAS, st.sampled_from(KINDS))
def test_every_schedule_that_is_not_refused_gives_finite_coefficients(
    kind: str, num_steps: int, one: float, other: float, prediction: str
) -> None:
    try:
        schedule = Schedule(ScheduleConfig(kind, num_steps, min(one, other), max(one, other)))
    except ValueError:
        return
    mix = Prediction(PredictionConfig(prediction), schedule).table(torch.device("cpu"))
    assert mix.isfinite().all()
    assert (mix[:, 2] > 0).all()  # `predict_x_0` divides by it
    for sampler in SAMPLERS:
        for count in {1, 2, num_steps // 2, num_steps} - {0}:
            if count <= num_steps:
                assert make_plan(schedule, sampler, count).coefficients.isfinite().all()


@pytest.fixture
def points() -> Tensor:
    """Returns two images for each of three labels. Any two differ in half of their pixels (Hadamard matrix)."""
    bits = torch.arange(16)[None] & torch.arange(1, 7)[:, None]  # (6, 16)
    parity = sum((bits >> i) & 1 for i in range(4)) % 2
    return (parity * 1.6 - 0.8).reshape(6, *SHAPE)


LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def draw(denoiser: Any, schedule: Schedule, y: list[int], **options: Any) -> Tensor:
    """Returns samples (B, 16) for labels y, seed 11 and indices 0, 1, ..."""
    rows = len(y)
    keys = {"seed": torch.full((rows,), 11), "index": torch.arange(rows), "image_shape": SHAPE, "null_label": 10}
    return sample(denoiser, schedule, torch.tensor(y), **keys | options).flatten(1)


def noise(row: int, step: int) -> Tensor:
    """Returns the noise that `draw` uses for a row, (16,) in float64."""
    return normal(torch.tensor([11]), torch.tensor([row]), torch.tensor([step]), SHAPE).double().flatten()


class OneGrey:
    """The optimal denoiser for images whose pixels all have the same value, from N(mean, std^2)."""

    def __init__(self, mean: float, std: float, schedule: Schedule) -> None:
        self.mean, self.variance, self.alpha_bar = mean, std**2, schedule.alpha_bar.float()

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha_bar_t = self.alpha_bar[t][:, None, None, None]
        seen = x_t.mean(dim=(1, 2, 3), keepdim=True) / alpha_bar_t.sqrt()  # the value, with noise
        variance = (1 - alpha_bar_t) / alpha_bar_t / x_t[0].numel()
        x_0 = (self.variance * seen + variance * self.mean) / (self.variance + variance)
        return (x_t - alpha_bar_t.sqrt() * x_0) / (1 - alpha_bar_t).sqrt()


class Gaussian:
    """The optimal denoiser for data from N(0, std^2). Its probability flow ODE has a closed-form solution."""

    def __init__(self, std: float, schedule: Schedule) -> None:
        self.variance, self.alpha_bar = std**2, schedule.alpha_bar

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha_bar_t = self.alpha_bar[t][:, None, None, None]
        return (1 - alpha_bar_t).sqrt() * x_t / (alpha_bar_t * self.variance + 1 - alpha_bar_t)

    def end_of_flow(self, x_t: Tensor, t: int) -> Tensor:
        alpha_bar_t = self.alpha_bar[t]
        return x_t * (self.variance / (alpha_bar_t * self.variance + 1 - alpha_bar_t)).sqrt()


@EVERY_SCHEDULE
@EVERY_SAMPLER
@pytest.mark.parametrize("num_steps", [100, 20, 8])
def test_samples_of_the_ideal_denoiser_are_data_points_of_their_label(
    points: Tensor, schedule: Schedule, sampler: Sampler, num_steps: int
) -> None:
    y = [0, 1, 2] * 8
    samples = draw(IdealDenoiser(points, LABELS, schedule), schedule, y, sampler=sampler, num_steps=num_steps)
    distance = (samples[:, None] - points.flatten(1)).abs().amax(dim=2)  # (B, 6)
    nearest = distance.argmin(dim=1)
    assert distance.amin(dim=1).max() < 0.02
    assert LABELS[nearest].tolist() == y
    assert set(nearest.tolist()) == set(range(6))


@EVERY_SAMPLER
def test_samples_have_the_distribution_of_the_data(points: Tensor, sampler: Sampler) -> None:
    one_to_three = IdealDenoiser(points[[0, 1, 1, 1]], torch.zeros(4).long(), COSINE)
    samples = draw(one_to_three, COSINE, [0] * 400, sampler=sampler, num_steps=50)
    share = ((samples - points[0].flatten()).abs().amax(dim=1) < 0.02).double().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


@EVERY_SCHEDULE
def test_ddpm_equals_algorithm_2_of_the_paper(points: Tensor, schedule: Schedule) -> None:
    """Compares with Ho 2020, algorithm 2, with the variance of eq. 7 instead of beta."""
    denoiser, alpha_bar = IdealDenoiser(points, LABELS, schedule), schedule.alpha_bar.tolist()
    samples = draw(denoiser, schedule, [0, 1, 2])
    for row in range(3):
        x_t = noise(row, 0)
        for k, t in enumerate(range(100, 0, -1), start=1):
            alpha_t = alpha_bar[t] / alpha_bar[t - 1]
            beta_t = 1 - alpha_t
            eps = denoiser(x_t.reshape(1, *SHAPE), torch.tensor([t]), torch.tensor([row])).flatten()
            mean = (x_t - beta_t / math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_t)
            sigma_t = math.sqrt((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta_t)
            x_t = mean + sigma_t * (noise(row, k) if t > 1 else 0)
        torch.testing.assert_close(samples[row].double(), x_t, rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_steps", [100, 13, 1])
def test_predicted_x_0_is_clipped_before_the_posterior(num_steps: int) -> None:
    """Compares with Ho 2020, eq. 6 and 7, for consecutive timesteps of the plan."""
    alpha_bar = COSINE.alpha_bar.tolist()
    samples = draw(lambda x_t, t, y: 2 * x_t.flip(3) - 0.3, COSINE, [0, 1], num_steps=num_steps)
    for row in range(2):
        x_t = noise(row, 0)
        for k, (t, t_prev) in enumerate(pairwise(COSINE.even_timesteps(num_steps)), start=1):
            eps = 2 * x_t.reshape(SHAPE).flip(2).flatten() - 0.3
            x_0 = (x_t - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
            x_0 = x_0.clip(-1, 1)
            beta = 1 - alpha_bar[t] / alpha_bar[t_prev]
            mean = math.sqrt(alpha_bar[t_prev]) * beta * x_0 + math.sqrt(1 - beta) * (1 - alpha_bar[t_prev]) * x_t
            variance = beta * (1 - alpha_bar[t_prev]) / (1 - alpha_bar[t])
            x_t = mean / (1 - alpha_bar[t]) + math.sqrt(variance) * noise(row, k)
        torch.testing.assert_close(samples[row].double(), x_t, rtol=0, atol=1e-3)


@EVERY_SCHEDULE
@pytest.mark.parametrize("num_steps", [100, 20, 7])
def test_ddim_equals_equation_12_of_the_paper(points: Tensor, schedule: Schedule, num_steps: int) -> None:
    denoiser, alpha_bar = IdealDenoiser(points, LABELS, schedule), schedule.alpha_bar
    samples = draw(denoiser, schedule, [0, 1, 2], sampler="ddim", num_steps=num_steps)
    for row in range(3):
        x_t = noise(row, 0)
        for t, t_prev in pairwise(schedule.even_timesteps(num_steps)):
            eps = denoiser(x_t.reshape(1, *SHAPE), torch.tensor([t]), torch.tensor([row])).flatten()
            predicted_x_0 = (x_t - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
            x_t = alpha_bar[t_prev].sqrt() * predicted_x_0 + (1 - alpha_bar[t_prev]).sqrt() * eps
        torch.testing.assert_close(samples[row].double(), x_t, rtol=0, atol=1e-3)


@EVERY_SCHEDULE
@pytest.mark.parametrize("num_steps", [100, 20, 9, 2, 1])
@pytest.mark.parametrize("data", ["points", "gaussian"])
def test_dpmpp_equals_algorithm_2_of_the_paper(points: Tensor, schedule: Schedule, num_steps: int, data: str) -> None:
    """Compares with Lu 2022b. The first step has first order, and the last one too, because lambda_0 is infinite."""
    denoiser = IdealDenoiser(points, LABELS, schedule) if data == "points" else Gaussian(0.25, schedule)
    samples = draw(denoiser, schedule, [0, 1, 2], sampler="dpmpp", num_steps=num_steps)
    steps = schedule.log_snr_timesteps(num_steps)
    alpha = {t: math.sqrt(schedule.alpha_bar[t]) for t in steps}
    sigma = {t: math.sqrt(1 - schedule.alpha_bar[t]) for t in steps}
    lamb = {t: math.log(alpha[t] / sigma[t]) if t else math.inf for t in steps}

    def x_theta(x: Tensor, t: int, row: int) -> Tensor:
        eps = denoiser(x.reshape(1, *SHAPE), torch.tensor([t]), torch.tensor([row])).flatten()
        return (x - sigma[t] * eps) / alpha[t]

    for row in range(3):
        x, history = noise(row, 0), []
        for i in range(1, num_steps + 1):
            s, t = steps[i - 1], steps[i]
            history.append(x_theta(x, s, row))
            h = lamb[t] - lamb[s]
            D = history[-1]
            if 1 < i < num_steps:
                r = (lamb[s] - lamb[steps[i - 2]]) / h
                D = (1 + 1 / (2 * r)) * history[-1] - 1 / (2 * r) * history[-2]
            x = sigma[t] / sigma[s] * x - alpha[t] * (math.exp(-h) - 1) * D
        torch.testing.assert_close(samples[row].double(), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [6, 10, 20, 50])
def test_dpmpp_generates_images_as_bright_as_the_data(num_steps: int) -> None:
    """At T the mean image has nearly disappeared in the noise. A path that began below T would have to ignore it."""
    of_grey = OneGrey(-0.6, 0.12, COSINE)
    images = draw(of_grey, COSINE, [0] * 1_000, sampler="dpmpp", num_steps=num_steps, image_shape=(1, 28, 28))
    assert abs(images.mean() + 0.6) < 0.02  # the standard error is 0.004


def test_dpmpp_follows_the_probability_flow_more_closely_than_ddim() -> None:
    gaussian, errors = Gaussian(0.2, COSINE), {}
    for sampler, num_steps in (("ddim", 20), ("ddim", 100), ("dpmpp", 20)):
        samples = draw(gaussian, COSINE, [0] * 4, sampler=sampler, num_steps=num_steps).double()
        start = make_plan(COSINE, sampler, num_steps).timesteps[0]
        exact = torch.stack([gaussian.end_of_flow(noise(row, 0), start) for row in range(4)])
        errors[sampler, num_steps] = ((samples - exact).abs().max() / exact.abs().max()).item()
    assert errors["ddim", 100] < errors["ddim", 20] / 3 < 0.15
    assert errors["dpmpp", 20] < errors["ddim", 20] / 3


@EVERY_SAMPLER
def test_row_gives_the_same_image_in_any_batch(points: Tensor, sampler: Sampler) -> None:
    denoiser = IdealDenoiser(points, LABELS, COSINE)
    together = draw(denoiser, COSINE, [0, 1, 2, 0], sampler=sampler, num_steps=10)
    for row, label in enumerate([0, 1, 2, 0]):
        alone = draw(denoiser, COSINE, [label], sampler=sampler, num_steps=10, index=torch.tensor([row]))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_deterministic_samplers_add_no_noise(sampler: Sampler) -> None:
    assert not make_plan(COSINE, sampler, 30).coefficients[:, 3].any()


@EVERY_SCHEDULE
@EVERY_SAMPLER
def test_plan_has_num_steps_distinct_decreasing_timesteps(schedule: Schedule, sampler: Sampler) -> None:
    for num_steps in range(1, 101):
        plan = make_plan(schedule, sampler, num_steps)
        assert plan.num_steps == num_steps == len(plan.coefficients)
        assert sorted(set(plan.timesteps), reverse=True) == list(plan.timesteps)
        assert plan.timesteps[-1] == 0
        assert plan.coefficients.isfinite().all()
        # The last step returns the predicted x_0 without noise.
        torch.testing.assert_close(plan.coefficients[-1], torch.tensor([0.0, 1.0, 0.0, 0.0]))


@EVERY_SAMPLER
def test_denoiser_and_on_step_are_called_at_the_timesteps_of_the_plan(points: Tensor, sampler: Sampler) -> None:
    denoiser, seen = IdealDenoiser(points, LABELS, COSINE), []
    draw(denoiser, COSINE, [2, 0], sampler=sampler, num_steps=9, on_step=lambda t, x_t, x_0: seen.append(t))
    *timesteps, _ = make_plan(COSINE, sampler, 9).timesteps
    assert [t.tolist() for t, _ in denoiser.calls] == [[t, t] for t in timesteps]
    assert [y.tolist() for _, y in denoiser.calls] == [[2, 0]] * 9
    assert seen == timesteps


def test_guidance_scale_1_is_off(points: Tensor) -> None:
    guided, plain = (IdealDenoiser(points, LABELS, COSINE) for _ in range(2))
    one = draw(guided, COSINE, [0, 1], num_steps=10, guidance=Guidance(scale=1.0))
    assert torch.equal(one, draw(plain, COSINE, [0, 1], num_steps=10))
    assert len(guided.calls) == 10
    eps = torch.randn(2, 2, *SHAPE)
    torch.testing.assert_close(guide(eps[0], eps[1], torch.tensor(1.0)), eps[0])


def test_guide_extrapolates_from_unconditional_to_conditional() -> None:
    eps_cond, eps_uncond = torch.randn(2, 3, *SHAPE)
    scale = torch.tensor([0.0, 1.0, 3.0])[:, None, None, None]
    guided = guide(eps_cond, eps_uncond, scale)
    torch.testing.assert_close(guided[0], eps_uncond[0])
    torch.testing.assert_close(guided[1], eps_cond[1])
    torch.testing.assert_close(guided[2] - eps_cond[2], 2 * (eps_cond[2] - eps_uncond[2]))


def test_guidance_is_applied_only_within_its_interval(points: Tensor) -> None:
    denoiser = IdealDenoiser(points, LABELS, COSINE)
    draw(denoiser, COSINE, [0, 2], guidance=Guidance(scale=2.0, start=20, stop=80))
    without_class = [t[0].item() for t, y in denoiser.calls if y.tolist() == [10, 10]]
    assert without_class == list(range(80, 19, -1))
    assert [t[0].item() for t, y in denoiser.calls if y.tolist() == [0, 2]] == list(range(100, 0, -1))


def test_guided_sample_equals_a_sample_of_a_guided_denoiser(points: Tensor) -> None:
    ideal = IdealDenoiser(points, LABELS, COSINE)

    def guided(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        eps = ideal(x_t, t, y)
        null = ideal(x_t, t, torch.full_like(y, 10))
        return torch.where((t >= 30)[:, None, None, None], 2.5 * eps - 1.5 * null, eps)

    expected = draw(guided, COSINE, [0, 1, 2], num_steps=25)
    samples = draw(ideal, COSINE, [0, 1, 2], num_steps=25, guidance=Guidance(scale=2.5, start=30))
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-4)


def test_reverse_step_uses_the_coefficients_of_each_row() -> None:
    x_t, x_0, x_0_prev, z = torch.randn(4, 3, *SHAPE)
    coefficients = torch.randn(3, 4)
    x_prev = reverse_step(x_t, x_0, x_0_prev, z, coefficients)
    for row, (a, b, c, s) in enumerate(coefficients.tolist()):
        torch.testing.assert_close(x_prev[row], a * x_t[row] + b * x_0[row] + c * x_0_prev[row] + s * z[row])


def test_unknown_sampler_is_rejected() -> None:
    with pytest.raises(ValueError, match="unknown sampler 'euler': must be one of ddpm, ddim, dpmpp"):
        make_plan(COSINE, "euler", 10)  # type: ignore[arg-type]


class OtherPrediction:
    """Converts the eps of a denoiser to another prediction kind."""

    def __init__(self, denoiser: Any, kind: str) -> None:
        self.denoiser = denoiser
        self.prediction = Prediction(PredictionConfig(kind), COSINE)

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha_bar_t = COSINE.alpha_bar[t][:, None, None, None]
        eps = self.denoiser(x_t, t, y)
        x_0 = (x_t - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()
        return self.prediction.target(x_0, eps, t)


@EVERY_SAMPLER
@pytest.mark.parametrize("kind", ["v", "edm"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, 20, 80)], ids=["unguided", "guided"])
def test_samples_do_not_depend_on_the_prediction_kind(
    points: Tensor, sampler: Sampler, kind: str, guidance: Guidance
) -> None:
    ideal = IdealDenoiser(points, LABELS, COSINE)
    other = OtherPrediction(ideal, kind)
    expected = draw(ideal, COSINE, [0, 1, 2, 0], sampler=sampler, num_steps=20, guidance=guidance)
    drawn = draw(
        other, COSINE, [0, 1, 2, 0], sampler=sampler, num_steps=20, guidance=guidance, prediction=other.prediction
    )
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)


@EVERY_SAMPLER
@pytest.mark.parametrize("path", [[100, 60, 30, 0], [40, 13, 1, 0], [100, 60, 100, 60, 30, 80, 0, 50, 0]])
def test_known_pixels_stay_on_the_forward_process_on_any_path(sampler: Sampler, path: list[int]) -> None:
    plan = plan_through(COSINE, sampler, path)
    assert plan.timesteps == (*(t for t, t_next in pairwise(path) if t_next < t), 0)
    signal, noise = COSINE.alpha_bar.sqrt(), (1 - COSINE.alpha_bar).sqrt()
    for (t, t_next), (a, b, c, s) in zip(pairwise(plan.timesteps), plan.coefficients.double(), strict=True):
        # With x_0 known, x_t = signal x_0 + noise eps must become an image of the same form at the next timestep.
        torch.testing.assert_close(a * signal[t] + b + c, signal[t_next], rtol=0, atol=1e-6)
        torch.testing.assert_close(a**2 * noise[t] ** 2 + s**2, noise[t_next] ** 2, rtol=0, atol=1e-6)


def test_step_before_a_jump_is_the_step_followed_by_the_forward_process() -> None:
    a, b, _, s = plan_through(COSINE, "ddpm", [70, 40, 60, 0]).coefficients[0].double()
    down_a, down_b, _, down_s = plan_through(COSINE, "ddpm", [70, 40, 0]).coefficients[0].double()
    alpha = COSINE.alpha_bar[60] / COSINE.alpha_bar[40]  # x_60 = sqrt(alpha) x_40 + sqrt(1 - alpha) eps
    torch.testing.assert_close(torch.stack([a, b]), alpha.sqrt() * torch.stack([down_a, down_b]), rtol=0, atol=1e-6)
    torch.testing.assert_close(s**2, alpha * down_s**2 + 1 - alpha, rtol=0, atol=1e-6)


def test_forward_process_visits_timesteps_in_any_order() -> None:
    plan = plan_through(COSINE, "forward", [80, 60, 90, 0])
    signal, noise = COSINE.alpha_bar.sqrt(), (1 - COSINE.alpha_bar).sqrt()
    assert plan.timesteps == (80, 60, 90, 0)
    for t_next, (a, b, c, s) in zip([60, 90, 0], plan.coefficients.double().tolist(), strict=True):
        assert (a, c) == (0, 0)
        assert (b, s) == pytest.approx((signal[t_next].item(), noise[t_next].item()), abs=1e-6)


@pytest.mark.parametrize("path", [[50], [50, 60, 0], [50, 50, 0], [50, 20, 30, 40, 0], [60, 30, 50]])
def test_invalid_paths_are_rejected(path: list[int]) -> None:
    with pytest.raises(ValueError, match="a path must go down"):
        plan_through(COSINE, "ddpm", path)


@EVERY_SAMPLER
@pytest.mark.parametrize("num_steps", [0, 101])
def test_num_steps_out_of_range_is_rejected(sampler: Sampler, num_steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps must be 1 to 100"):
        make_plan(COSINE, sampler, num_steps)


T_IMAGE, T = 65, 85


def test_steps_of_a_noisy_image_use_each_noise_and_its_negative() -> None:
    path = [T_IMAGE, T, 70, 92]
    plan = plan_through(COSINE, "noisy", path)
    assert plan.timesteps == (85, 85, 70, 70, 92, 92, 0)
    generator = torch.Generator().manual_seed(0)
    u, *z = torch.randn(1 + plan.num_steps, 1, 1, 4, 4, generator=generator)
    levels = [noise_above(COSINE, T_IMAGE, t) for t in path[1:]]
    first, second = levels[0]
    x_t = first * u + second * z[0]
    expected = []
    for (signal, noise), n in zip(levels, z[::2], strict=False):
        expected += [signal * u + noise * n, signal * u - noise * n]
    for k, wanted in enumerate(expected):
        torch.testing.assert_close(x_t, wanted)
        # The pixels are known, so x_0 is u. Noise z[k + 1] is added after step k.
        x_t = reverse_step(x_t[None], u[None], u[None], z[min(k + 1, len(z) - 1)][None], plan.coefficients[k : k + 1])[
            0
        ]
    torch.testing.assert_close(x_t, u)


def test_error_of_a_noisy_image_is_that_of_the_posterior_mean_of_the_image() -> None:
    """For x_0 ~ N(m, v), u = x_0 + s e and y = x_t / signal = u + sqrt(gamma) n are jointly normal.

    Their conditional means given y follow from Bishop 2006, eq. 2.96.
    """
    m, v = 0.3, 0.4
    u, n = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance, variance_t = ((1 - COSINE.alpha_bar[t]) / COSINE.alpha_bar[t] for t in (T_IMAGE, T))
    signal, noise = noise_above(COSINE, T_IMAGE, T)
    x_t = signal * u + noise * n
    x_0 = m + v / (v + variance_t) * (x_t / signal - m)
    expected = u - (m + (v + variance) / (v + variance_t) * (x_t / signal - m))
    plan = plan_through(COSINE, "noisy", [T_IMAGE, T])
    of_known, of_x_t = plan.table(torch.device("cpu"))[0, 5:].double()
    gamma = variance_t - variance
    torch.testing.assert_close(gamma / variance_t * (of_known * u + of_x_t * x_t - x_0), expected, rtol=1e-5, atol=1e-5)


def test_guidance_without_a_null_label_is_an_error() -> None:
    seed = torch.zeros(1, dtype=torch.int64)
    keys = {"seed": seed, "index": seed, "image_shape": SHAPE, "guidance": Guidance(2.0)}
    with pytest.raises(ValueError, match="null_label"):
        sample(lambda x_t, t, y: x_t, COSINE, seed, **keys)  # type: ignore[arg-type]
