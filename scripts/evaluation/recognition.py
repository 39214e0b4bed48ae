"""Recognition of images by a classifier: accuracy and confusion matrix."""

from dataclasses import dataclass

import torch

from scripts.common.data.data_set import ImageSet
from scripts.evaluation.classifiers import Classifier, probabilities_of


@dataclass(frozen=True, slots=True)
class Recognition:
    """The recognition results of a classifier for a set of images."""

    accuracy: float  # share recognised as the requested class
    per_class: tuple[float, ...]  # share recognised, for each class
    confusion: tuple[tuple[int, ...], ...]  # [requested][recognised as] -> number of images
    entropy: float  # mean entropy of the predicted probabilities, in nats

    @property
    def worst_class(self) -> int:
        """The label with the lowest accuracy."""
        return self.per_class.index(min(self.per_class))


def recognition(network: Classifier, asked: ImageSet) -> Recognition:
    """Classifies the images. There must be at least one image of each class."""
    probabilities = probabilities_of(network, asked.images)  # (N, K)
    num_classes = probabilities.shape[1]
    seen = probabilities.argmax(dim=1)
    pairs = asked.labels * num_classes + seen  # (N,)
    confusion = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    per_class = confusion.diagonal().double() / confusion.sum(dim=1)
    return Recognition(
        accuracy=(seen == asked.labels).double().mean().item(),
        per_class=tuple(per_class.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        entropy=torch.special.entr(probabilities).sum(dim=1).mean().item(),
    )
