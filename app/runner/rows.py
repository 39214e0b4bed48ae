"""Which rows a step takes, and what the network sees of them, as the indices that a compiled step is called with."""

from collections.abc import Sequence

from app.engine.job import Trajectory
from app.runner.slots import NOBODY
from app.runner.transfers import Shapes, Transfers
from model.step import Rows


def rows_of(trajectories: Sequence[Trajectory], shapes: Shapes, transfers: Transfers) -> Rows:
    """Of one network: a second evaluation for each that is guided at its next step.

    Where the shapes are rounded, rows of nobody follow those of the trajectories, and evaluations of the first row
    the guided ones: the results of both are for nobody.
    """
    count = shapes.rows(len(trajectories))
    slots = [trajectory.slot for trajectory in trajectories]
    assert None not in slots, "they have begun"
    guided = [place for place, trajectory in enumerate(trajectories) if trajectory.evaluations == 2]
    num_evaluations = shapes.evaluations(count, len(guided))
    second = list(range(count))
    for evaluation, place in enumerate(guided, start=count):
        second[place] = evaluation
    parts = (
        [slot or NOBODY for slot in slots] + [NOBODY] * (count - len(slots)),
        [trajectory.step for trajectory in trajectories] + [0] * (count - len(slots)),
        [*range(count), *guided, *[0] * (num_evaluations - count - len(guided))],
        second,
    )
    return Rows(*transfers.upload([index for part in parts for index in part]).split([len(part) for part in parts]))
