"""What a classifier sees in digits: how many it recognises as asked, and what it takes the others for."""

from dataclasses import dataclass

import torch

from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.classifiers import Classifier, probabilities_of
from scripts.evaluation.samples import Digits


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a classifier sees in digits."""

    accuracy: float  # share recognised as asked
    per_digit: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]  # [asked][seen] -> images
    entropy: float  # mean of the predicted distribution's, in nats

    @property
    def worst_digit(self) -> int:
        """The digit with the smallest share."""
        return self.per_digit.index(min(self.per_digit))


def recognition(network: Classifier, digits: Digits) -> Recognition:
    """Of digits of which there is at least one of each."""
    probabilities = probabilities_of(network, digits.images)  # (N, 10)
    seen = probabilities.argmax(dim=1)
    pairs = digits.labels * NUM_CLASSES + seen  # (N,)
    confusion = pairs.bincount(minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)
    per_digit = confusion.diagonal().double() / confusion.sum(dim=1)
    return Recognition(
        accuracy=(seen == digits.labels).double().mean().item(),
        per_digit=tuple(per_digit.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        entropy=torch.special.entr(probabilities).sum(dim=1).mean().item(),
    )
