"""Tests of one step of a pipeline, compared with its equations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.pipelines.folder import load_pipeline
from model.pipelines.model import PipelineModel
from model.pipelines.step import CPU_ROWS, PipelineState, cpu_threads
from model.step import Rows
from tests.pipelines import write_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
CPU = torch.device("cpu")
SLOTS = 3


@pytest.fixture
def model(tmp_path: Path) -> PipelineModel:
    write_pipeline(tmp_path, num_classes=4)
    return PipelineModel(load_pipeline(tmp_path), null_label=3)


@pytest.fixture
def state(model: PipelineModel) -> PipelineState:
    """The state of three rows: x_t is noise, and the left half of each image is known."""
    generator, state = torch.Generator().manual_seed(0), PipelineState.zeros(SLOTS, model.image_shape, CPU)
    state.x_t, known, z = torch.randn(3, SLOTS, *model.image_shape, generator=generator)
    state.known, state.z = known.clamp(-1, 1), z
    assert state.is_known is not None
    state.is_known[..., :8] = True
    state.seed, state.has_z = torch.arange(SLOTS), torch.tensor([True, False, False])
    state.guidance_scale = torch.tensor([1.0, 3.0, 1.0])
    return state


@torch.inference_mode()
def test_guided_row_known_pixels_errors_and_noise(model: PipelineModel, state: PipelineState) -> None:
    plan = model.plan("ddpm", 1, (700, 400, 0))
    slot, label = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2, 3])  # the last evaluation is unconditional
    rows = Rows(slot, torch.zeros(4).long(), label, torch.ones(SLOTS).long(), torch.tensor([0, 3, 2]))
    step = model.step(CPU, torch.float32)
    stepped = step(state, plan.table(CPU), rows)

    t = torch.full((4,), 699.0)
    cond, other, last, uncond = model.network(state.x_t[slot], t, torch.tensor([0, 1, 2, 3])).split(1)
    output = torch.cat([cond, uncond + 3 * (other - uncond), last])
    alpha_bar = model.schedule.alpha_bar[700].item()
    x_0 = ((state.x_t - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5).clamp(-1, 1)
    assert state.known is not None and state.is_known is not None
    x_0 = state.known.where(state.is_known, x_0)
    assert torch.allclose(stepped.x_0, x_0, atol=1e-4)

    first = (state.x_t[0] - (1 - alpha_bar) ** 0.5 * cond[0]) / alpha_bar**0.5 - state.known[0]
    assert stepped.error[0].item() == pytest.approx(first[..., :8].square().sum().item(), rel=1e-3)

    _, a, b, c, s, *_ = plan.rows[0].tolist()
    drawn = (stepped.x_prev - a * state.x_t - b * stepped.x_0 - c * state.x_0) / s
    assert torch.allclose(drawn[0], state.z[0], atol=1e-3)
    assert not torch.allclose(drawn[1], state.z[1], atol=0.1)
    assert 0.9 < drawn[1].std() < 1.1


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, CPU_ROWS, CPU_ROWS + 1])
def test_every_call_has_the_same_number_of_rows(
    model: PipelineModel, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    step, sizes = model.step(CPU, torch.float32), list[int]()
    forward = step.network.forward

    def recorded(x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x_t))
        return forward(x_t, t, y)

    monkeypatch.setattr(step.network, "forward", recorded)
    slots, zeros = torch.arange(count), torch.zeros(count).long()
    state = PipelineState.zeros(count, model.image_shape, CPU)
    rows = Rows(slots, zeros, zeros, 1 + zeros, slots)
    assert len(step(state, model.plan("ddpm", 2).table(CPU), rows).x_prev) == count
    assert sizes == [CPU_ROWS] * (1 + (count - 1) // CPU_ROWS)


def test_row_that_is_not_finite_is_reported(model: PipelineModel) -> None:
    state, slots = PipelineState.zeros(2, model.image_shape, CPU), torch.arange(2)
    state.x_t[1, 0, 0, 0] = torch.nan
    rows = Rows(slots, torch.zeros(2).long(), torch.zeros(2).long(), torch.ones(2).long(), slots)
    assert model.step(CPU, torch.float32)(state, model.plan("ddpm", 2).table(CPU), rows).finite.tolist() == [
        True,
        False,
    ]


def test_number_of_threads_is_a_power_of_two() -> None:
    assert [cpu_threads(count) for count in (1, 2, 3, 4, 7, 8, 64)] == [1, 2, 2, 4, 4, 8, 8]


# Sizes that fit badly to vectors: one level of 12 channels with 9 x 9 pixels.
BAD_SIZES: dict[str, Any] = {
    "sample_size": 9,
    "block_out_channels": (12,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


@pytest.mark.parametrize(("sizes", "independent"), [({}, True), (BAD_SIZES, False)])
def test_rows_whose_bits_depend_on_their_place_are_found_and_get_their_own_calls(
    tmp_path: Path, sizes: dict[str, Any], independent: bool
) -> None:
    write_pipeline(tmp_path, **sizes)
    step = PipelineModel(load_pipeline(tmp_path)).step(CPU, torch.float32)
    assert step.has_independent_rows() == independent
    step.use_single_rows()
    x_t, c = torch.randn(4, *step.image_shape, generator=torch.Generator().manual_seed(1)), torch.zeros(4, 2)
    order = torch.tensor([2, 0, 3, 1])
    with torch.inference_mode():
        one, other = (step.call_rows.call(step.denoise, x_t[rows], c) for rows in (torch.arange(4), order))
    assert torch.equal(one[order], other)
