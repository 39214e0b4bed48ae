import math
from statistics import NormalDist

import pytest
import torch

from model.schedule import Schedule, ScheduleConfig
from scripts.common.data.data_set import ImageSet
from scripts.common.progress import Reporter
from scripts.evaluation.fog import informedness, lost_at, recognised_in_fog, show_fog, standard_error
from tests.scripts.evaluation.bars import FixedClassifier, bars

SCHEDULE = Schedule(ScheduleConfig())


def mean_clipped(mean: float, deviation: float) -> float:
    """Returns the mean of a normal variable that is clipped to [0, 1]."""
    if deviation < 1e-6:
        return min(max(mean, 0), 1)
    normal, low, high = NormalDist(), -mean / deviation, (1 - mean) / deviation
    between = normal.cdf(high) - normal.cdf(low)
    return mean * between + deviation * (normal.pdf(low) - normal.pdf(high)) + 1 - normal.cdf(high)


class Threshold(FixedClassifier):
    """Answers 7 while the contrast of the bar exceeds a threshold, and 0 otherwise."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        contrast = torch.stack([image[0, self.bar].mean() - image[0, ~self.bar].mean() for image in x])
        return torch.nn.functional.one_hot(torch.where(contrast > 0.25, 7, 0), 10) * 50.0


def test_recognition_falls_with_the_remaining_signal() -> None:
    digits = bars(400, 0)
    sevens = digits.images[digits.labels == 7]
    network = Threshold(torch.empty(0))
    network.bar = sevens[0, 0] > 100
    # The function needs images of every digit. The answers for the other digits do not matter.
    shown = ImageSet(
        torch.cat([sevens, digits.images[:10]]), torch.cat([torch.full((len(sevens),), 7), torch.arange(10)])
    )
    steps = [0, 20, 40, 60, 80, 100]
    with Reporter() as reporter:
        recognised, shares = recognised_in_fog(network.eval(), shown, SCHEDULE, steps, reporter)
    assert shares.shape == (6, 10)
    seen = []
    for t in steps:
        signal, noise = math.sqrt(SCHEDULE.alpha_bar[t]), math.sqrt(1 - SCHEDULE.alpha_bar[t])
        bar, rest = (mean_clipped((signal * x_0 + 1) / 2, noise / 2) for x_0 in (1, 2 * 19.5 / 255 - 1))
        seen.append(bar - rest > 0.25)
    assert [share > 0.5 for share in shares[:, 7].tolist()] == seen
    assert [share > 0.5 for share in recognised[:, 7].tolist()] == seen
    assert recognised[-1, 0] == 1  # the classifier answers 0 for every image
    assert shares[-1, 0].abs() < 0.05  # the constant answer has no information
    assert lost_at(steps, shares)[7] == steps[seen.index(False)]


def test_lost_at_is_the_first_timestep_below_the_limit_or_none() -> None:
    shares = torch.ones(3, 10)
    shares[1:, 4] = 0.2
    assert lost_at([0, 50, 100], shares) == [None, None, None, None, 50, None, None, None, None, None]


def test_informedness_is_0_for_constant_and_half_for_half_correct_answers() -> None:
    always_eight = torch.zeros(10, 10, dtype=torch.long)
    always_eight[:, 8] = torch.tensor([10, 11, 9, 10, 10, 8, 10, 10, 10, 12])
    assert informedness(always_eight).tolist() == pytest.approx([0] * 10)
    assert informedness(torch.eye(10) * 7).tolist() == pytest.approx([1] * 10)
    half = torch.eye(10) * 10
    half[3, 3], half[3, 5] = 5, 5  # five 3s are recognised as 5
    assert informedness(half)[3].item() == pytest.approx(0.5)
    assert informedness(half)[5].item() == pytest.approx(1 - 5 / 90)


def test_plot_has_a_line_per_digit() -> None:
    shares = torch.rand(3, 10)
    (axes,) = show_fog([0, 50, 100], shares, torch.full((3, 10), 0.01)).axes
    lines = [list(line.get_ydata()) for line in axes.lines]
    for digit in range(10):
        assert pytest.approx(shares[:, digit].tolist()) in lines


def test_label_of_a_digit_is_on_its_line() -> None:
    shares = torch.stack([torch.ones(10), torch.linspace(0.9, 0.95, 10), torch.zeros(10)])
    (axes,) = show_fog([0, 50, 100], shares, torch.zeros(3, 10)).axes
    labels = {text.get_text(): text.get_position() for text in axes.texts}
    for digit in range(10):
        t, height = labels[str(digit)]
        assert height == pytest.approx(shares[1, digit].item() * (100 - t) / 50)


def test_standard_error_is_that_of_two_independent_shares() -> None:
    recognised, informed = torch.full((1, 10), 0.8), torch.full((1, 10), 0.7)
    counts = torch.full((10,), 100)
    expected = (0.8 * 0.2 / 100 + 0.1 * 0.9 / 900) ** 0.5
    assert standard_error(recognised, informed, counts).flatten().tolist() == pytest.approx([expected] * 10)
