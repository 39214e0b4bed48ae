"""The protocol of comparisons: they compare the classes of an image over several steps.

`Recognition`, `NoisyComparison` and `ClassDistances` implement it. `compare` in model/process.py runs comparisons. This
module does not import torch.
"""

from collections.abc import Sequence
from typing import Protocol


class Comparison(Protocol):
    """Compares the classes of an image by the errors of their predictions. It drops classes with much larger errors."""

    @property
    def num_classes(self) -> int:
        """The number of classes at the start."""

    @property
    def has_own_images(self) -> bool:
        """True if each class has its own x_t. False if all classes predict x_0 from the same x_t."""

    @property
    def remaining(self) -> list[int]:
        """The classes that the next step must evaluate. It is empty when the result is final."""

    @property
    def label(self) -> int:
        """The class with the smallest errors so far."""

    def add(self, errors: Sequence[float]) -> None:
        """Adds the errors of a step (see `Stepped.error`), one for each class of `remaining`."""
