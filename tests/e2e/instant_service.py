"""The service with a runner that computes nothing: `python -m tests.e2e.instant_service`.

Its steps take no time and its images are noise, so that the speed of everything else can be measured.
"""

from collections.abc import Callable, Sequence

import numpy as np

import app.runner.load
from app.__main__ import main
from app.engine.interface import Reading, Ready
from app.engine.job import Pixels, StepRows, Trajectory
from app.runner.runner import Runner

NOISE = np.random.default_rng(0).integers(0, 256, (512, 28, 28), dtype=np.uint8)


class InstantRunner(Runner):
    """Returns noise that differs between images and steps."""

    def step(self, rows: StepRows, before_call: Callable[[], None] = lambda: None) -> list[Trajectory]:
        before_call()
        return []

    def pixels(self, trajectories: list[Trajectory]) -> Reading[Sequence[Pixels | None]]:
        return Ready(_noise(trajectories))

    def pixels_with_x_t(self, trajectories: list[Trajectory]) -> Reading[Sequence[tuple[Pixels, Pixels] | None]]:
        return Ready(list(zip(_noise(trajectories), reversed(_noise(trajectories)), strict=True)))

    def check(self) -> None:
        pass


def _noise(trajectories: list[Trajectory]) -> list[Pixels]:
    return [NOISE[(7 * row.index + row.step) % len(NOISE)] for row in trajectories]


if __name__ == "__main__":
    app.runner.load.Runner = InstantRunner  # type: ignore[misc] # what load_runner creates
    main()
