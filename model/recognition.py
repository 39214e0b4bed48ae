"""Recognises the class of an image with the diffusion model: the class whose prediction is closest to the image.

This is a diffusion classifier (Li 2023; Clark & Jaini 2023). A pair (t, eps) turns the image x_0 into
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. The network predicts x_0 from x_t for every class. The distance
of a class is the Euclidean distance between its prediction and the image. The score of a class is a weighted sum of its
distances over several pairs.

All images use the same pairs, so the result is reproducible. A fixed eps also has the same influence on the distances
of every image. The offsets of `Readout` remove this influence, so that few pairs are enough.

The decisions after each pair are plain Python, because tensors of a few values are slower. This module does not import
torch. `recognise` in model/process.py runs the network.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.json_fields import build

if TYPE_CHECKING:
    from torch import Tensor

RECOGNITION_SEED = 0  # the noise of pair k is normal(RECOGNITION_SEED, 0, k); other seeds need other offsets
DEFAULT_NUM_PAIRS, MAX_NUM_PAIRS = 20, 100
# Timesteps of the pairs, for T = 100. They are repeated. The order was chosen greedily on validation digits: each
# timestep is the one that improves the accuracy of the earlier ones most. One pair at t = 75 to 85 recognises most
# digits. One pair below t = 60 recognises few digits, but it improves the accuracy of other pairs. One pair at t = 80
# recognises 96% of the validation digits with the offsets of `Readout`, and 89% without them.
CYCLE = (80, 70, 90, 60, 75, 50, 85, 65, 40, 55)
SHIPPED_READOUT = Path(__file__).parent / "weights" / "recognition.json"
SMALLEST_ERROR = 1e-6  # avoids the logarithm of 0


def timesteps(num_pairs: int, num_steps: int = 100) -> tuple[int, ...]:
    """Returns the timestep of each pair, in the order of evaluation, for a schedule with T = num_steps.

    More pairs continue the list of fewer pairs. Raises ValueError if num_pairs is not in 1..MAX_NUM_PAIRS.
    """
    if not 1 <= num_pairs <= MAX_NUM_PAIRS:
        raise ValueError(f"num_pairs must be 1 to {MAX_NUM_PAIRS}, got {num_pairs}")
    return tuple(max(round(CYCLE[k % len(CYCLE)] * num_steps / 100), 1) for k in range(num_pairs))


@dataclass(frozen=True, slots=True)
class Readout:
    """Constants that turn distances into log-odds. They were fitted by logistic regression on validation digits.

    They depend on the weights of the network. `python -m scripts.evaluate recognize --fit` fits them again.
    """

    weights_sha256: str  # of the checkpoint that they were fitted for
    weights: tuple[float, ...]  # (len(CYCLE),) weight of a distance at each timestep
    offsets: tuple[tuple[float, ...], ...]  # (MAX_NUM_PAIRS, num_classes); subtracted from the weighted distances
    half_at: float  # number of pairs at which the log-odds are half of the sum; pairs of one image are not independent
    margin: float  # log-odds below the best class at which a class is dropped
    # (len(CYCLE), 2) for each timestep: log distance of a real digit = first * ink + second
    typical: tuple[tuple[float, ...], ...]
    suspicion: tuple[float, ...]  # (len(CYCLE),) weight of a log distance above the typical one
    bias: float  # log-odds of "not a digit" for typical distances, if half of all images are digits
    limit: float  # log-odds of "not a digit" that 1% of the validation digits exceed

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.offsets[0])

    @classmethod
    def of(cls, weights_sha256: str, num_classes: int) -> "Readout":
        """Returns the constants for a network with these weights. Without fitted constants, there are no offsets."""
        shipped = _shipped()
        return shipped if weights_sha256 == shipped.weights_sha256 else shipped.without_offsets(num_classes)

    def without_offsets(self, num_classes: int) -> "Readout":
        """Returns the same weights without offsets, for any network with this number of classes."""
        offsets = ((0.0,) * num_classes,) * MAX_NUM_PAIRS
        return replace(self, weights_sha256="", offsets=offsets)


class Recognition:
    """Compares the classes of one image. Its state depends only on the errors that were added.

    `remaining` lists the classes that the next pair must evaluate. It is empty when the result is final.
    """

    has_own_images = False  # all classes predict x_0 from the same x_t

    def __init__(
        self,
        readout: Readout,
        ink: float,
        num_pairs: int = DEFAULT_NUM_PAIRS,
        *,
        num_steps: int = 100,
        prune: bool = True,
    ) -> None:
        """`ink` is the result of `ink_of` for the image. `num_steps` is T of the schedule."""
        self.timesteps = timesteps(num_pairs, num_steps)
        self._readout, self.ink, self._prune = readout, ink, prune
        self.num_classes = num_classes = readout.num_classes
        self._scores = [0.0] * num_classes  # of the classes that are not dropped; lower is better
        self._behind = [0.0] * num_classes  # log-odds below the best class; fixed when a class is dropped
        self.errors: list[dict[int, float]] = []  # of each pair so far: class -> error
        self._in_question = list(range(num_classes))
        self.remaining = list(self._in_question)
        self.evaluations = 0

    def add(self, errors: Sequence[float]) -> None:
        """Adds the errors of the next pair, one for each class of `remaining`, in this order.

        An error is the sum over all pixels of the squared difference between the predicted x_0, before clipping, and
        the image. Takes about 10 microseconds.
        """
        if len(errors) != len(self.remaining) or not errors:
            raise ValueError(f"{len(errors)} errors for {len(self.remaining)} remaining classes")
        pair = len(self.errors)
        weight, offsets = self._readout.weights[pair % len(CYCLE)], self._readout.offsets[pair]
        self.errors.append(dict(zip(self.remaining, errors, strict=True)))
        self.evaluations += len(errors)
        for y, error in self.errors[pair].items():
            self._scores[y] += weight * math.sqrt(error) - offsets[y]
        self._update(pair + 1)

    def _update(self, num_pairs: int) -> None:
        scale = 1 / (1 + num_pairs / self._readout.half_at)
        best = min(self._scores[y] for y in self._in_question)
        if len(self._in_question) > 1:  # with one class left, the log-odds of the dropped classes do not change
            for y in self._in_question:
                self._behind[y] = scale * (self._scores[y] - best)
        if self._prune:
            self._in_question = [y for y in self._in_question if self._behind[y] <= self._readout.margin]
        is_final = len(self._in_question) == 1 and num_pairs >= len(CYCLE)
        self.remaining = [] if is_final or num_pairs == len(self.timesteps) else list(self._in_question)

    @property
    def label(self) -> int:
        """The most probable class so far."""
        return min(self._in_question, key=self._scores.__getitem__)

    @property
    def probabilities(self) -> list[float]:
        """The probability of each class so far. A dropped class keeps the log-odds that it had when it was dropped."""
        odds = [math.exp(-behind) for behind in self._behind]
        return [each / sum(odds) for each in odds]

    @property
    def suspicion(self) -> float:
        """The log-odds that the image shows no digit, if half of all images are digits.

        They follow from the distances of the most probable class in the first pairs. An image that shows no digit has
        larger distances than a digit with the same ink.
        """
        digit, total = self.label, self._readout.bias
        constants = zip(self._readout.suspicion, self._readout.typical, self.errors, strict=False)
        for weight, (slope, intercept), errors in constants:
            if digit in errors:
                distance = 0.5 * math.log(max(errors[digit], SMALLEST_ERROR))
                total += weight * (distance - slope * self.ink - intercept)
        return total

    @property
    def is_digit(self) -> bool:
        """False if the image probably shows no digit. This is wrong for about 1% of real digits."""
        return self.suspicion <= self._readout.limit


def ink_of(x_0: "Tensor") -> list[float]:
    """Returns log(1 + |x_0 - black|) of each image x_0 (N, C, H, W) in [-1, 1], with the Euclidean norm.

    The distances of a digit grow with it.
    """
    return (x_0 + 1).flatten(1).norm(dim=1).log1p().tolist()


@cache
def _shipped() -> Readout:
    content: dict[str, Any] = json.loads(SHIPPED_READOUT.read_text("utf-8"))
    return build(Readout, content)
