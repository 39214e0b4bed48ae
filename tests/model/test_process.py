from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, load
from model.diffusion import Diffusion
from model.noise import normal
from model.prediction import unclipped_x_0
from model.process import Start, begin, draw
from model.sampler import Plan, make_plan, plan_through, sample
from model.spec import SAMPLERS, Guidance, Sampler
from model.step import ReverseStep, Rows, State, Stepped
from tests.model.tiny_checkpoint import tiny_checkpoint

ROWS = [("ddim", 4), ("ddpm", 9), ("ddpm", 9), ("dpmpp", 1), ("dpmpp", 5)]
KEYS = {
    "seed": torch.tensor([5, 2**53 - 1, 2**53 - 1, 0, 7]),
    "index": torch.tensor([0, 0, 1, 0, 3]),
    "y": torch.tensor([3, 1, 1, 8, 0]),
}
GUIDANCE = Guidance(2.0, 20, 80)
NULL = 10  # label of a network with ten classes that means "no class"


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
    x_0 = draw(step, plans, loaded.image_shape, **KEYS, null_label=NULL, guidance=guidance)
    for row, (sampler, num_steps) in enumerate(ROWS):
        expected = sample(
            loaded.network,
            loaded.schedule,
            **{name: value[row : row + 1] for name, value in KEYS.items()},
            image_shape=loaded.image_shape,
            sampler=sampler,  # type: ignore[arg-type]
            num_steps=num_steps,
            null_label=NULL,
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
        calls.append((len(rows.slots), len(rows.slot)))
        stepped: Stepped = step(state, plans, rows)
        return stepped

    draw(counted, plans, loaded.image_shape, **KEYS, null_label=NULL, guidance=GUIDANCE)
    for k, (num_rows, num_evaluations) in enumerate(calls):
        timesteps = [plan.timesteps[k] for plan in plans if k < plan.num_steps]
        assert num_rows == len(timesteps)
        assert num_evaluations == num_rows + sum(GUIDANCE.acts_at(t) for t in timesteps)
    assert len(calls) == 9


def test_on_step_is_called_with_the_rows_of_each_step(loaded: Checkpoint, step: ReverseStep, plans: list[Plan]) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    drawn = draw(step, plans, loaded.image_shape, **KEYS, on_step=lambda k, x_t, x_0: seen.append((k, x_t, x_0)))
    state, *_ = begin(plans, loaded.image_shape, seed=KEYS["seed"], index=KEYS["index"])
    assert [k for k, _, _ in seen] == list(range(9))
    assert torch.equal(seen[0][1], state.x_t)
    assert torch.equal(seen[0][2][3], drawn[3])  # this row has one step
    assert torch.equal(seen[-1][2], drawn[1:3])


def given_rows(loaded: Checkpoint) -> tuple[Tensor, Tensor]:
    """Returns images (5, C, H, W) in [-1, 1], and a mask of their known pixels: half of the pixels of three rows."""
    images = torch.rand(5, *loaded.image_shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    is_known = torch.zeros_like(images, dtype=torch.bool)
    is_known[:3, ..., : images.shape[-1] // 2] = True
    return images, is_known


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_are_returned_exactly_and_the_others_are_generated(
    loaded: Checkpoint, step: ReverseStep, sampler: Sampler
) -> None:
    images, is_known = given_rows(loaded)
    plan = plan_through(loaded.schedule, sampler, [100, 60, 80, 60, 20, 0])
    start = Start(images, torch.zeros(5), torch.ones(5), is_known)
    x_0 = draw(step, [plan] * 5, loaded.image_shape, **KEYS, start=start)
    assert torch.equal(x_0[is_known], images[is_known])
    assert (x_0 - images)[~is_known].abs().mean() > 0.1


def test_rows_with_known_pixels_do_not_change_the_bits_of_other_rows(loaded: Checkpoint, step: ReverseStep) -> None:
    images, is_known = given_rows(loaded)
    plans = [make_plan(loaded.schedule, "ddpm", 6)] * 5
    alone = draw(step, plans, loaded.image_shape, **KEYS, null_label=NULL, guidance=GUIDANCE)
    start = Start(images, torch.zeros(5), torch.ones(5), is_known)
    together = draw(step, plans, loaded.image_shape, **KEYS, null_label=NULL, guidance=GUIDANCE, start=start)
    assert torch.equal(alone[3:], together[3:])
    assert not torch.equal(alone[:3], together[:3])


def test_start_at_a_timestep_is_the_forward_process(loaded: Checkpoint) -> None:
    images, _ = given_rows(loaded)
    plans = [plan_through(loaded.schedule, "ddim", [40, 0])] * 5
    state, *_ = begin(
        plans, loaded.image_shape, seed=KEYS["seed"], index=KEYS["index"], start=Start.at(loaded.schedule, 40, images)
    )
    z = normal(KEYS["seed"], KEYS["index"], torch.zeros(5, dtype=torch.int64), loaded.image_shape)
    expected, _ = Diffusion(loaded.schedule, torch.Generator()).add_noise(images, torch.full((5,), 40), z)
    torch.testing.assert_close(state.x_t, expected, rtol=0, atol=1e-6)
    assert not state.is_known.any()


def test_errors_of_an_image_are_those_of_its_noisy_versions_for_every_label(
    loaded: Checkpoint, step: ReverseStep
) -> None:
    """A row whose pixels are all known visits timesteps of the forward process, with keyed noise."""
    images, timesteps = given_rows(loaded)[0][:1], [80, 30, 65]
    keys = {"seed": torch.tensor([9]), "index": torch.tensor([2])}
    start = Start.at(loaded.schedule, timesteps[0], images, torch.ones_like(images, dtype=torch.bool))
    plan = plan_through(loaded.schedule, "forward", [*timesteps, 0])
    state, table, _ = begin([plan], loaded.image_shape, **keys, start=start)
    labels, zero = torch.arange(11), torch.zeros(11, dtype=torch.int64)
    for k, t in enumerate(timesteps):
        stepped = step(state, table, Rows(zero, zero + k, labels, torch.tensor([1 + k]), zero[:1]))
        eps = normal(**keys, step=torch.tensor([k]), image_shape=loaded.image_shape)
        x_t, _ = Diffusion(loaded.schedule, torch.Generator()).add_noise(images, torch.tensor([t]), eps)
        torch.testing.assert_close(state.x_t, x_t, rtol=0, atol=1e-6)
        every = torch.full((11,), t)
        output = loaded.network(x_t.expand(11, -1, -1, -1), every, labels)
        mix = loaded.prediction.table(torch.device("cpu"))[every]
        expected = (unclipped_x_0(x_t, output, mix) - images).square().sum(dim=(1, 2, 3))
        torch.testing.assert_close(stepped.error, expected, rtol=1e-4, atol=1e-4)
        assert stepped.error.std() > 0
        state.x_t = stepped.x_prev
    assert torch.equal(stepped.x_0, images)


def test_errors_are_summed_over_the_known_pixels_only(loaded: Checkpoint, step: ReverseStep) -> None:
    images, is_known = (of_rows[:1] for of_rows in given_rows(loaded))
    keys = {"seed": torch.tensor([9]), "index": torch.tensor([2])}
    plan = plan_through(loaded.schedule, "ddpm", [60, 0])
    zero, errors = torch.zeros(1, dtype=torch.int64), []
    for image in (images, torch.where(is_known, images, -images)):
        start = Start(image, torch.zeros(1), torch.ones(1), is_known)
        state, table, _ = begin([plan], loaded.image_shape, **keys, start=start)
        errors.append(step(state, table, Rows(zero, zero, zero, zero + 1, zero)).error)
    mix = loaded.prediction.table(torch.device("cpu"))[[60]]
    x_0 = unclipped_x_0(state.x_t, loaded.network(state.x_t, zero + 60, zero), mix)
    expected = (x_0 - images)[is_known].square().sum()[None]
    assert torch.equal(*errors)
    torch.testing.assert_close(errors[0], expected, rtol=1e-4, atol=1e-4)


def test_initial_state_is_contiguous_for_images_that_are_not(loaded: Checkpoint) -> None:
    """A compiled step needs contiguous inputs. An image that was rotated is not contiguous."""
    image = torch.rand(2, *loaded.image_shape).rot90(1, dims=(2, 3))
    start = Start.at(loaded.schedule, 50, image, image > 0.5)
    assert not start.rows(torch.arange(2)).image.is_contiguous()
    plan, seed = make_plan(loaded.schedule, "ddim", 2), torch.zeros(2, dtype=torch.int64)
    state, *_ = begin([plan, plan], loaded.image_shape, seed=seed, index=seed, start=start)
    assert all(part.is_contiguous() for part in state)
    assert torch.equal(state.known, image)


def test_guidance_without_a_null_label_is_an_error(loaded: Checkpoint, step: ReverseStep, plans: list[Plan]) -> None:
    with pytest.raises(ValueError, match="null_label"):
        draw(step, plans, loaded.image_shape, **KEYS, guidance=GUIDANCE)
