"""A noisy image: the timestep with its noise level, and the comparison of its classes.

model/denoising.py explains how noise is removed. This module does not import torch.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.schedule import Schedule
from model.spec import Sampler

if TYPE_CHECKING:
    from torch import Tensor

DENOISING_SAMPLER: Sampler = "ddim"  # recommended; new noise in each step can turn the result into another class
DENOISING_STEPS = 20  # recommended number of steps from T to 0; an image with weak noise needs only a part of them
WHITE = 255
NUM_PAIRS = 8  # timesteps of `comparison_path`; each takes two steps with opposite noise
FULL_PAIRS, NUM_CANDIDATES = 2, 4  # pairs that compare all classes, and the number of classes in the others
# The pairs are above the matching timestep and between these shares of T. At lower timesteps the classes have nearly
# equal predictions. At higher timesteps the image has little influence on the predictions.
LOWEST_PAIR, HIGHEST_PAIR = 0.6, 0.92
HIGHEST_COMPARED = 0.84  # share of T: images with this or a higher matching timestep are not compared
ODDS_SCALE, PREDICTION_VARIANCE = 0.04, 2.5  # fitted: see NoisyComparison.probabilities


def noise_levels(schedule: Schedule) -> "Tensor":
    """Returns the noise_std of x_t / sqrt(alpha_bar_t) in grey levels, (T + 1,) float64. It is 0 at t = 0."""
    alpha_bar = schedule.alpha_bar  # (T + 1,)
    return ((1 - alpha_bar) / alpha_bar).sqrt() * WHITE / 2  # (T + 1,)


def matching_timestep(schedule: Schedule, noise_std: float) -> int:
    """Returns the timestep t in 1..T whose noise level is nearest to noise_std on a logarithmic scale, or 0 for 0."""
    if noise_std == 0:
        return 0
    log_levels = noise_levels(schedule)[1:].log()  # (T,)
    return int((log_levels - math.log(noise_std)).abs().argmin()) + 1


def can_compare(schedule: Schedule, t_image: int) -> bool:
    """Returns True if the classes of an image with matching timestep `t_image` can be compared.

    An image with a higher matching timestep has nearly as much noise as x_T.
    """
    return t_image < HIGHEST_COMPARED * schedule.num_steps


def comparison_path(schedule: Schedule, t_image: int) -> list[int]:
    """Returns the path of the process "noisy" that recognises an image with matching timestep `t_image`.

    Its timesteps are above `t_image`. The most informative ones come first. Raises ValueError if `can_compare` is
    False.
    """
    if not can_compare(schedule, t_image):
        raise ValueError(f"t_image {t_image} has too much noise to compare the classes")
    T = schedule.num_steps
    lowest, highest = max(t_image, LOWEST_PAIR * T), HIGHEST_PAIR * T
    timesteps = [round(lowest + (highest - lowest) * (k + 1) / NUM_PAIRS) for k in range(NUM_PAIRS)]
    timesteps = [max(t, t_image + 1) for t in timesteps]  # of a schedule with few steps
    order = sorted(range(NUM_PAIRS), key=lambda k: abs(k - NUM_PAIRS // 2))
    return [t_image, *(timesteps[k] for k in order)]


class NoisyComparison:
    """Compares the classes of a noisy image along `comparison_path`, by the sum of their errors.

    After the first FULL_PAIRS pairs, all but the NUM_CANDIDATES best classes are dropped.
    """

    has_own_images = False

    def __init__(self, num_classes: int, noise_std: float) -> None:
        """`noise_std` is that of the image, in grey levels. Only the probabilities depend on it."""
        self.num_classes, self.noise_std = num_classes, noise_std
        self.sums = [0.0] * num_classes  # infinite for a dropped class
        self.remaining = list(range(num_classes))
        self._first_sums = list(self.sums)  # of all classes, after the first FULL_PAIRS pairs
        self._steps_done = 0

    def add(self, errors: Sequence[float]) -> None:
        """Adds the squared errors of a step, one for each class of `remaining`."""
        for label, error in zip(self.remaining, errors, strict=True):
            self.sums[label] += error
        self._steps_done += 1
        if self._steps_done == 2 * FULL_PAIRS:
            self._first_sums = list(self.sums)
            self.remaining = sorted(self.remaining, key=self.sums.__getitem__)[:NUM_CANDIDATES]
            self.sums = [each if label in self.remaining else math.inf for label, each in enumerate(self.sums)]
        if self._steps_done == 2 * NUM_PAIRS:
            self.remaining = []

    @property
    def label(self) -> int:
        """The class with the smallest sum so far."""
        return min(range(self.num_classes), key=self.sums.__getitem__)

    @property
    def estimated_sums(self) -> list[float]:
        """The sum of each class. A dropped class gets the errors of the worst candidate in the steps that it missed.

        The result is never below the sum of a candidate.
        """
        missed = max(each - first for each, first in zip(self.sums, self._first_sums, strict=True) if each < math.inf)
        return [min(each, first + missed) for each, first in zip(self.sums, self._first_sums, strict=True)]

    @property
    def probabilities(self) -> list[float]:
        """The probability of each class given the noisy image, after all steps. `label` has the largest one.

        With sum_c of `estimated_sums` and the variance sigma^2 of the noise, for pixels in [-1, 1]:

            p(c | x) = exp(-k sum_c) / sum_j exp(-k sum_j),  k = ODDS_SCALE / (sigma^2 + PREDICTION_VARIANCE)

        The form of k is that of a normal likelihood: the image x is the prediction plus independent noise of the
        variance sigma^2, and plus an error of the prediction. Both constants were fitted to the weights of the shipped
        checkpoint: they minimise the mean negative log-likelihood of the first 500 digits of the shuffled validation
        split, at the timesteps 20, 35, 50, 60, 65, 70, 75 and 80 of T = 100. The sums of another network need other
        constants. This command prints them:

            python -m scripts.evaluate denoise --split validation --num-images 500 --out out/denoise.png
        """
        sigma = self.noise_std / (WHITE / 2)
        k = ODDS_SCALE / (sigma**2 + PREDICTION_VARIANCE)
        sums = self.estimated_sums
        odds = [math.exp(-k * (each - min(sums))) for each in sums]
        return [each / sum(odds) for each in odds]
