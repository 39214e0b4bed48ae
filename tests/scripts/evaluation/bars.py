"""Test data: images of ten classes that are easy to distinguish, and classifiers with known results."""

import torch
from torch import Tensor

from scripts.common.data.data_set import ImageSet
from scripts.evaluation.classifiers import Extractor, Judge, Trained
from scripts.evaluation.spaces import Space


def bars(count: int, seed: int) -> ImageSet:
    """Returns images of a bar in noise. The position of the bar is the class. The classes go from 0 to 9 in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 40, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 5)
        image[0, 4 + 12 * row : 12 + 12 * row, 4 + 4 * column : 7 + 4 * column] = 255
    return ImageSet(images, labels)


def untrained(kind: type[Judge] | type[Extractor]) -> Trained:
    torch.manual_seed(0)
    return Trained(kind().eval().requires_grad_(False), {"test_accuracy": 0.125, "num_test": 80}, "0" * 64)


def space_of_pixels() -> Space:
    """Returns a feature space that is fast to compute: some of the pixels."""
    return Space("clip", "1" * 64, lambda images: images[:, :, 1::4, 1::4].flatten(1).float())


class FixedClassifier(Judge):
    """Returns given digits for any images, and keeps the images in `shown`."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers, self.shown = answers, torch.empty(0)
        self.head = torch.nn.Identity()  # type: ignore[assignment]

    def features(self, x: Tensor) -> Tensor:
        self.shown = x
        return torch.nn.functional.one_hot(self.answers, 10) * 50.0
