"""How many rows a step has: as many as pay for the jobs that are there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.pace import Pace

COMPANY_SLOWDOWN = 3.0  # whoever is in company waits at most so many times as long for a step as alone
BEST_TOLERANCE = 0.02  # of the best throughput: a larger batch is not worth less than that


@dataclass(frozen=True, slots=True)
class Limits:
    """`shared` evaluations while a larger step would slow somebody down; up to `most` rows where all gain by it.

    In the time of one step of `most` rows, `break_even` rows are stepped by steps of `shared`.
    """

    shared: int
    most: int
    break_even: float
    is_fixed: bool = False  # so many rows, whatever they take

    @classmethod
    def fixed(cls, rows: int) -> "Limits":
        """The same whoever is there."""
        return cls(rows, rows, rows, is_fixed=True)

    @classmethod
    def auto(cls, pace: Pace) -> "Limits":
        """From how long a step of so many rows takes."""
        most = pace.best_batch(BEST_TOLERANCE)
        shared = min(pace.largest_batch(COMPANY_SLOWDOWN), most)
        return cls(shared, most, shared * pace.step_seconds(most) / pace.step_seconds(shared))

    def rows(self, images: Sequence[int], evaluations: float = 1.0) -> int:
        """For jobs of so many unfinished images each, which take so many evaluations of the network a row and step.

        They take turns, so that the smallest job is done when all have had as many as it has images. While small
        steps are there sooner than a large one, or than two, they stay small for its sake, but for a row a job.
        """
        turns = min(images, default=0) * len(images)
        if turns > self.break_even * min(math.ceil(turns / self.most), 2):
            return self.most
        shared = self.shared if self.is_fixed else max(1, int(self.shared / evaluations))
        return min(max(shared, len(images)), self.most)

    def lowered_to(self, rows: int) -> "Limits":
        """At most so many."""
        return replace(self, shared=min(self.shared, rows), most=min(self.most, rows))
