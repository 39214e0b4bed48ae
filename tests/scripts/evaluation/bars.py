"""Ten classes that are easily told apart, and classifiers that are as good or as bad as a test needs."""

import torch
from torch import Tensor

from scripts.evaluation.classifiers import Extractor, Judge, Trained
from scripts.evaluation.samples import Digits


def bars(count: int, seed: int) -> Digits:
    """A bar whose place is the class, in static; the classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 40, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 5)
        image[0, 4 + 12 * row : 12 + 12 * row, 4 + 4 * column : 7 + 4 * column] = 255
    return Digits(images, labels)


def untrained(kind: type[Judge] | type[Extractor]) -> Trained:
    torch.manual_seed(0)
    return Trained(kind().eval().requires_grad_(False), {"test_accuracy": 0.125, "num_test": 80}, "0" * 64)


class Witness(Judge):
    """Keeps what it is shown; sees what it is told to see."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.seen, self.shown = seen, torch.empty(0)
        self.head = torch.nn.Identity()  # type: ignore[assignment]

    def features(self, x: Tensor) -> Tensor:
        self.shown = x
        return torch.nn.functional.one_hot(self.seen, 10) * 50.0
