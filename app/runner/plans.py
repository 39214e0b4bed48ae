"""The table of every plan that was asked for, so that rows of many kinds take their step in one call."""

import torch

from app.engine.job import Options
from model.sampler import make_plan
from model.schedule import Schedule

FIRST_ROWS = 16_384  # room for every sampler in every number of up to 100 steps: a GPU's graph holds for one size


class Plans:
    """(P, 5), a row a step: t, a, b, c, s; it grows when it is full."""

    def __init__(self, device: torch.device) -> None:
        self.table = torch.zeros(FIRST_ROWS, 5, device=device)  # (P, 5)
        self._starts: dict[tuple[str, str, int], int] = {}  # where each plan begins
        self._num_rows = 0

    def start_of(self, options: Options, schedule: Schedule) -> int:
        """Where this plan starts; it is made the first time that it is asked for."""
        key = (options.model, options.sampler, options.num_steps)
        if key not in self._starts:
            plan = make_plan(schedule, options.sampler, options.num_steps).table(self.table.device)  # (num_steps, 5)
            start, stop = self._num_rows, self._num_rows + len(plan)
            while stop > len(self.table):
                self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            self.table[start:stop] = plan
            self._starts[key], self._num_rows = start, stop
        return self._starts[key]
