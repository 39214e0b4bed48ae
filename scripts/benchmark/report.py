"""Numbers out of answers: rates, percentiles, and tables with the spread over repeats."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.benchmark.load import Answer


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen between two times of the same clock."""

    start: float
    end: float
    answers: tuple[Answer, ...]
    due_from: float  # whose latencies count: in an open loop the start, in a closed one the first request

    @property
    def images_a_second(self) -> float:
        """A request that began before it, or ended after it, counts with the share of its time that lies within."""
        return sum(a.images * self._share(a) for a in self.answers if a.status == 200) / (self.end - self.start)

    def latencies(self, kind: str | None = None) -> list[float]:
        """Seconds of the requests that were due until its end, of one kind or of all."""
        return [a.latency for a in self.answers if self.due_from <= a.planned < self.end and kind in (None, a.kind)]

    def goodput(self, objective: float) -> float:
        """Images a second of requests that were due within it and answered within `objective` seconds."""
        good = (a for a in self.answers if self.start <= a.planned < self.end and a.status == 200)
        return sum(a.images for a in good if a.latency <= objective) / (self.end - self.start)

    @property
    def failures(self) -> int:
        """Requests that were not answered with 200."""
        return sum(answer.status != 200 for answer in self.answers)

    def _share(self, answer: Answer) -> float:
        within = min(answer.done, self.end) - max(answer.sent, self.start)
        return max(within, 0.0) / (answer.done - answer.sent)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def with_spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and the range where there is more than one."""
    middle = f"{statistics.median(values):.{digits}g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}g} - {max(values):.{digits}g})"
