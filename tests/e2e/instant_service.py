"""The service with a runner that computes nothing: `python -m tests.e2e.instant_service`.

Its steps take no time and its images are noise, so that the speed of everything else can be measured.
"""

from collections.abc import Callable

import numpy as np

import app.main
from app.cli import main
from app.engine.job import Pixels, Trajectory
from app.runner.runner import Runner

NOISE = np.random.default_rng(0).integers(0, 256, (512, 28, 28), dtype=np.uint8)


class InstantRunner(Runner):
    """Returns noise that differs between images and steps."""

    def step(self, trajectories: list[Trajectory], before_call: Callable[[], None] = lambda: None) -> list[bool]:
        before_call()
        return [True] * len(trajectories)

    def pixels(self, trajectories: list[Trajectory]) -> list[Pixels]:
        return [NOISE[(7 * row.index + row.step) % len(NOISE)] for row in trajectories]

    def pixels_with_x_t(self, trajectories: list[Trajectory]) -> list[tuple[Pixels, Pixels]]:
        return list(zip(self.pixels(trajectories), reversed(self.pixels(trajectories)), strict=True))

    def check(self) -> None:
        pass


if __name__ == "__main__":
    app.main.Runner = InstantRunner  # type: ignore[misc] # what create_app loads
    main()
