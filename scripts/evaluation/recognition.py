"""Recognition of images by a classifier: accuracy and confusion matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.common.data.data_set import ImageSet
from scripts.evaluation.classifiers import Classifier, features_of


@dataclass(frozen=True, slots=True)
class Recognition:
    """The recognition results of a classifier for a set of images."""

    accuracy: float  # share recognised as the requested class
    per_class: tuple[float, ...]  # share recognised, for each class
    confusion: tuple[tuple[int, ...], ...]  # [requested][recognised as] -> number of images
    entropy: float  # mean entropy of the predicted probabilities, in nats

    @property
    def class_mean(self) -> float:
        """The accuracy if each class counted equally. Generated images have each class equally often."""
        return sum(self.per_class) / len(self.per_class)

    @property
    def worst_class(self) -> int:
        """The label with the lowest accuracy."""
        return self.per_class.index(min(self.per_class))


def recognition(network: Classifier, asked: ImageSet) -> Recognition:
    """Classifies the images. There must be at least one image of each class."""
    return recognition_of_features(network, features_of(network, asked.images), asked.labels)


def recognition_of_features(network: Classifier, features: Tensor, labels: Tensor) -> Recognition:
    """As `recognition`, for images of which the classifier's features (N, F) are known. `labels` is (N,)."""
    probabilities = network.head(features).softmax(dim=1)  # (N, K)
    num_classes = probabilities.shape[1]
    seen = probabilities.argmax(dim=1)
    pairs = labels * num_classes + seen  # (N,)
    confusion = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    per_class = confusion.diagonal().double() / confusion.sum(dim=1)
    return Recognition(
        accuracy=(seen == labels).double().mean().item(),
        per_class=tuple(per_class.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        entropy=torch.special.entr(probabilities).sum(dim=1).mean().item(),
    )
