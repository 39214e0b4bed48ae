from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, load
from model.process import begin, draw
from model.sampler import Guidance, Plan, make_plan, sample
from model.step import ReverseStep, Rows, State, Stepped
from tests.model.tiny_checkpoint import tiny_checkpoint

ROWS = [("ddim", 4), ("ddpm", 9), ("ddpm", 9), ("dpmpp", 1), ("dpmpp", 5)]
KEYS = {
    "seed": torch.tensor([5, 2**53 - 1, 2**53 - 1, 0, 7]),
    "index": torch.tensor([0, 0, 1, 0, 3]),
    "y": torch.tensor([3, 1, 1, 8, 0]),
}
GUIDANCE = Guidance(2.0, 20, 80)


@pytest.fixture
def loaded(tmp_path: Path) -> Checkpoint:
    return load(tiny_checkpoint(tmp_path))


@pytest.fixture
def step(loaded: Checkpoint) -> ReverseStep:
    return ReverseStep(loaded, torch.device("cpu"), torch.float32)


@pytest.fixture
def plans(loaded: Checkpoint) -> list[Plan]:
    """Returns the plan of each row. The second and the third row share a plan."""
    made = {row: make_plan(loaded.schedule, *row) for row in ROWS}  # type: ignore[arg-type]
    return [made[row] for row in ROWS]


@pytest.mark.parametrize("guidance", [None, GUIDANCE], ids=["off", "guided"])
def test_draw_equals_the_reference_loop_for_each_row(
    loaded: Checkpoint, step: ReverseStep, plans: list[Plan], guidance: Guidance | None
) -> None:
    x_0 = draw(step, plans, loaded.image_shape, **KEYS, guidance=guidance)
    for row, (sampler, num_steps) in enumerate(ROWS):
        expected = sample(
            loaded.network,
            loaded.schedule,
            **{name: value[row : row + 1] for name, value in KEYS.items()},
            image_shape=loaded.image_shape,
            sampler=sampler,  # type: ignore[arg-type]
            num_steps=num_steps,
            guidance=guidance,
            prediction=loaded.prediction,
        )
        assert (x_0[row] - expected[0]).abs().mean() < 1e-4
        assert (x_0[row] - x_0[row - 1]).abs().mean() > 0.1


def test_finished_rows_are_skipped_and_guided_rows_are_evaluated_twice(
    loaded: Checkpoint, step: ReverseStep, plans: list[Plan]
) -> None:
    calls: list[tuple[int, int]] = []

    def counted(state: State, plans: Tensor, rows: Rows) -> Stepped:
        calls.append((len(rows.slots), len(rows.source)))
        stepped: Stepped = step(state, plans, rows)
        return stepped

    draw(counted, plans, loaded.image_shape, **KEYS, guidance=GUIDANCE)
    for k, (num_rows, num_evaluations) in enumerate(calls):
        timesteps = [plan.timesteps[k] for plan in plans if k < plan.num_steps]
        assert num_rows == len(timesteps)
        assert num_evaluations == num_rows + sum(GUIDANCE.acts_at(t) for t in timesteps)
    assert len(calls) == 9


def test_on_step_is_called_with_the_rows_of_each_step(loaded: Checkpoint, step: ReverseStep, plans: list[Plan]) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    drawn = draw(step, plans, loaded.image_shape, **KEYS, on_step=lambda k, x_t, x_0: seen.append((k, x_t, x_0)))
    state, _ = begin(plans, loaded.image_shape, **KEYS)
    assert [k for k, _, _ in seen] == list(range(9))
    assert torch.equal(seen[0][1], state.x_t)
    assert torch.equal(seen[0][2][3], drawn[3])  # this row has one step
    assert torch.equal(seen[-1][2], drawn[1:3])
