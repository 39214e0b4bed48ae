import pytest
import torch

from model.inpainting import MIN_STEPS, ClassDistances, recognition_path, repaint_timesteps
from model.noise import normal
from model.process import Start, compare, draw
from model.sampler import plan_through
from model.schedule import Schedule, ScheduleConfig
from model.step import Rows, State, Stepped

SCHEDULE = Schedule(ScheduleConfig())
SHAPE = (1, 4, 4)


class GaussianStep:
    """A step for images whose pixels all have the same normal value: N(mean of the class, std^2).

    All pixels of an image are equal, so the mean of x_t is a sufficient statistic and E[x_0 | x_t] is known exactly.
    """

    def __init__(self, means: list[float], std: float) -> None:
        self.means, self.std = torch.tensor(means), std
        self.x_t: list[tuple[int, torch.Tensor]] = []  # the timestep and the images of each step

    def __call__(self, state: State, plans: torch.Tensor, rows: Rows) -> Stepped:
        slots, step, label = rows.slots, rows.step, rows.label
        plan = plans[rows.plan_row[: len(slots)]]  # (B, 7)
        alpha_bar = SCHEDULE.alpha_bar[plan[:, 0].long()].float()[:, None, None, None]  # (B, 1, 1, 1)
        x_t, count = state.x_t[slots], state.x_t[0].numel()
        self.x_t.append((int(plan[0, 0]), x_t))
        precision = 1 / self.std**2 + count * alpha_bar / (1 - alpha_bar)
        seen = count * alpha_bar.sqrt() / (1 - alpha_bar) * x_t.mean(dim=(1, 2, 3), keepdim=True)
        mean = self.means[label[: len(slots)]][:, None, None, None]
        predicted = ((mean / self.std**2 + seen) / precision).expand_as(x_t)
        known, is_known = state.known[slots], state.is_known[slots]
        x_0 = known.where(is_known, predicted)
        a, b, c, s = plan[:, 1:5, None, None, None].unbind(dim=1)
        z = normal(state.seed[slots], state.index[slots], step, SHAPE)
        x_prev = a * x_t + b * x_0 + c * state.x_0[slots] + s * z
        error = (predicted - known).square().where(is_known, 0.0).sum(dim=(1, 2, 3))
        return Stepped(x_prev, x_0, error, torch.ones_like(slots, dtype=torch.bool))


def keys_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the seed and the index of each row."""
    return torch.full((count,), 7), torch.arange(count)


def fill_in(step: GaussianStep, path: list[int], image: torch.Tensor) -> torch.Tensor:
    """Fills in the right half of images (B, 1, 4, 4) of class 0."""
    count = len(image)
    seed, index = keys_of(count)
    start = Start.at(SCHEDULE, path[0], image, half(count))
    plans = [plan_through(SCHEDULE, "ddpm", path)] * count
    return draw(step, plans, SHAPE, seed=seed, index=index, y=torch.zeros_like(seed), start=start)


def half(count: int) -> torch.Tensor:
    """Returns known pixels (B, 1, 4, 4): the left half."""
    return (torch.arange(4) < 2).expand(count, *SHAPE)


def test_every_step_but_the_first_is_repeated() -> None:
    assert repaint_timesteps([100, 50, 10, 0], 3) == [100, 50, 10, 50, 10, 50, 10, 0, 10, 0, 10, 0]
    assert repaint_timesteps([100, 50, 10, 0], 1) == [100, 50, 10, 0]
    plan = plan_through(SCHEDULE, "ddpm", repaint_timesteps([100, 50, 10, 0], 3))
    assert plan.timesteps == (100, 50, 50, 50, 10, 10, 10, 0)


def test_fewer_than_one_resampling_is_rejected() -> None:
    with pytest.raises(ValueError, match="num_resamplings must be at least 1, got 0"):
        repaint_timesteps([100, 0], 0)


def test_known_pixels_have_the_noise_level_of_every_timestep_of_a_path_with_repetitions() -> None:
    count = 500
    image = torch.full((count, *SHAPE), 0.7)
    step = GaussianStep([0.0], std=0.5)
    x_0 = fill_in(step, repaint_timesteps([90, 60, 30, 10, 0], 3), image)
    assert torch.equal(x_0[half(count)], image[half(count)])
    assert [t for t, _ in step.x_t] == [90, 60, 60, 60, 30, 30, 30, 10, 10, 10]
    for t, x_t in step.x_t:
        seen, alpha_bar = x_t[half(count)].double(), SCHEDULE.alpha_bar[t].item()
        error = 4 / len(seen) ** 0.5  # four standard errors of a mean
        assert seen.mean().item() == pytest.approx(0.7 * alpha_bar**0.5, abs=error * (1 - alpha_bar) ** 0.5)
        assert seen.var().item() == pytest.approx(1 - alpha_bar, rel=error * 2**0.5)


def test_repetitions_fit_the_missing_pixels_to_the_known_ones() -> None:
    count = 200
    image = torch.linspace(-0.8, 0.8, count)[:, None, None, None].expand(count, *SHAPE).contiguous()
    misfits = []
    for num_resamplings in (1, 2, 5):
        x_0 = fill_in(GaussianStep([0.0], std=0.5), repaint_timesteps([100, 75, 50, 25, 0], num_resamplings), image)
        misfits.append((x_0 - image)[~half(count)].abs().mean().item())
    assert misfits[2] < misfits[1] < misfits[0]
    assert misfits[2] < 0.6 * misfits[0]


def distances(
    means: list[float], std: float, path: list[int], image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distances of all classes of images whose left half is known, and the numbers of calls."""
    count = len(image)
    seed, index = keys_of(count)
    plan, start = plan_through(SCHEDULE, "ddpm", path), Start.at(SCHEDULE, path[0], image, half(count))
    results = [ClassDistances(len(means), plan.num_steps) for _ in image]
    compare(GaussianStep(means, std), [plan] * count, results, seed=seed, index=index, start=start)
    calls = torch.tensor([result.evaluations for result in results])
    return torch.tensor([result.distances for result in results]), calls


def test_the_class_of_the_known_pixels_has_the_lowest_distance() -> None:
    values = torch.tensor([-0.7, -0.5, -0.1, 0.1, 0.5, 0.7])
    image = values[:, None, None, None].expand(-1, *SHAPE).contiguous()
    image[~half(6)] = 9.0  # missing pixels must not count
    path = repaint_timesteps([100, 90, 80, 70, 60, 50], 4)
    all_distances, _ = distances([-0.6, 0.0, 0.6], 0.1, path, image)
    assert all_distances.argmin(dim=1).tolist() == [0, 0, 1, 1, 2, 2]
    alone, _ = distances([-0.6, 0.0, 0.6], 0.1, path, image[:1])
    torch.testing.assert_close(alone, all_distances[:1])


def test_the_distance_of_a_class_is_that_of_its_predicted_image() -> None:
    image = torch.full((1, *SHAPE), 0.5)
    found, calls = distances([0.3, -0.3], 0.01, [50, 0], image)
    # With a narrow prior, the predicted image is the mean of the class. 8 pixels are known.
    torch.testing.assert_close(found, 8**0.5 * torch.tensor([[0.2, 0.8]]), rtol=0.05, atol=0.0)
    assert calls.tolist() == [2]


def test_a_class_with_a_much_larger_distance_is_dropped_and_needs_no_further_calls() -> None:
    image = torch.full((1, *SHAPE), 0.9)
    path = [90, 50, 90, 50, 90, 50, 90, 50, 90, 50, 90, 50, 0]
    # After k steps, the distance of the class -0.9 is larger by k * sqrt(8) * 1.8 = 5.1 k. It is dropped after
    # MIN_STEPS steps.
    found, calls = distances([0.9, -0.9, 0.8], 0.01, path, image)
    assert found.isinf().tolist() == [[False, True, False]]
    assert calls.tolist() == [3 * MIN_STEPS + 2 * (7 - MIN_STEPS)]


def test_the_path_of_the_recognition_goes_down_several_times_and_stays_at_high_noise() -> None:
    timesteps = plan_through(SCHEDULE, "ddpm", recognition_path(SCHEDULE)).timesteps[:-1]
    one_pass = [t for t in (90, 80, 70, 60, 50, 40) for _ in range(2)]
    assert list(timesteps) == [100, *one_pass * 3]
