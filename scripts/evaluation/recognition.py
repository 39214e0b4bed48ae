"""Recognition of digits by a classifier: accuracy and confusion matrix."""

from dataclasses import dataclass

import torch

from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.classifiers import Classifier, probabilities_of
from scripts.evaluation.samples import Digits


@dataclass(frozen=True, slots=True)
class Recognition:
    """The recognition results of a classifier for a set of digits."""

    accuracy: float  # share recognised as the requested digit
    per_digit: tuple[float, ...]  # share recognised, for each digit
    confusion: tuple[tuple[int, ...], ...]  # [requested][recognised as] -> number of images
    entropy: float  # mean entropy of the predicted probabilities, in nats

    @property
    def worst_digit(self) -> int:
        """The digit with the lowest accuracy."""
        return self.per_digit.index(min(self.per_digit))


def recognition(network: Classifier, digits: Digits) -> Recognition:
    """Classifies the images. There must be at least one image of each digit."""
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
