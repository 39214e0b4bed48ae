"""Compares with finite differences, the reverse step from the moved x_0, and the same rows in other batches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import load
from model.clip import Clip
from model.clip_guidance import ClipGuidance, ClipGuidedStep, guide_with_clip, similarity_gradient
from model.process import draw
from model.prompts import digit_prompt
from model.sampler import make_plan, reverse_step
from model.spec import CALL_ROWS, MAX_CLIP_GUIDANCE_SCALE, SAMPLERS, Guidance, Sampler
from model.step import ReverseStep, Stepped
from tests.model.tiny_checkpoint import tiny_checkpoint

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip()


@pytest.fixture(scope="module")
def text(clip: Clip) -> Tensor:
    return clip.embed_prompts([digit_prompt(digit) for digit in range(10)])


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_gradient_equals_the_difference_quotient(clip: Clip, text: Tensor) -> None:
    x, direction = images(3), torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    epsilon = 1e-2

    def similarity(x_0: Tensor) -> Tensor:
        return (clip.embed_images(x_0) * text[:3]).sum(dim=1).double()

    quotient = (similarity(x + epsilon * direction) - similarity(x - epsilon * direction)) / (2 * epsilon)
    slope = (similarity_gradient(clip, x, text[:3]) * direction).sum(dim=(1, 2, 3)).double()
    torch.testing.assert_close(slope, quotient, rtol=0.02, atol=2e-4)


def test_gradient_of_an_image_has_the_same_bits_in_every_batch_and_with_1_or_2_threads(
    clip: Clip, text: Tensor
) -> None:
    x, own = images(3 * CALL_ROWS), text[torch.arange(3 * CALL_ROWS) % 10]
    before = torch.get_num_threads()
    alone = torch.cat([similarity_gradient(clip, x[i : i + 1], own[i : i + 1]) for i in range(len(x))])
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in (1, 2, 3, CALL_ROWS, CALL_ROWS + 1, len(x)):
                order = torch.randperm(len(x), generator=torch.Generator().manual_seed(count))[:count]
                assert torch.equal(similarity_gradient(clip, x[order], own[order]), alone[order])
    finally:
        torch.set_num_threads(before)


def stepped(count: int) -> Stepped:
    generator = torch.Generator().manual_seed(2)
    x_prev = torch.randn(count, 1, 28, 28, generator=generator)
    return Stepped(x_prev, images(count), torch.zeros(count), torch.ones(count, dtype=torch.bool))


def test_guided_rows_move_by_the_scale_and_become_more_similar(clip: Clip, text: Tensor) -> None:
    step = stepped(6)
    inside = step._replace(x_0=step.x_0 * 0.5)  # far from -1 and 1, so that nothing is clipped
    scale = torch.tensor([0.1, 0.2, 0.3])
    rows = torch.tensor([4, 0, 2])
    guided = guide_with_clip(clip, inside, rows, torch.zeros(3), text[:3], scale)
    moved = (guided.x_0 - inside.x_0)[rows]
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), scale)
    before, after = ((clip.embed_images(x[rows]) * text[:3]).sum(dim=1) for x in (inside.x_0, guided.x_0))
    assert (after > before).all()


def test_rows_without_clip_guidance_keep_their_bits(clip: Clip, text: Tensor) -> None:
    step, rows = stepped(6), torch.tensor([1, 5])
    guided = guide_with_clip(clip, step, rows, torch.ones(2), text[:2], torch.ones(2))
    others = torch.tensor([0, 2, 3, 4])
    for one, other in zip(guided, step, strict=True):
        assert torch.equal(one[others], other[others])


def test_pixels_stay_in_range(clip: Clip, text: Tensor) -> None:
    scale = torch.full((2,), float(MAX_CLIP_GUIDANCE_SCALE))
    guided = guide_with_clip(clip, stepped(2), torch.arange(2), torch.ones(2), text[:2], scale)
    assert guided.x_0.abs().max() <= 1


def test_nan_is_reported_as_not_finite(clip: Clip, text: Tensor) -> None:
    step = stepped(3)
    step.x_0[1] = torch.nan
    guided = guide_with_clip(clip, step, torch.arange(3), torch.ones(3), text[:3], torch.ones(3))
    assert guided.finite.tolist() == [True, False, True]


def test_guided_row_that_was_not_finite_stays_so(clip: Clip, text: Tensor) -> None:
    """The x_0 of an infinite prediction is clipped, and therefore finite."""
    step = stepped(3)
    step.finite[2] = False
    guided = guide_with_clip(clip, step, torch.tensor([2, 0]), torch.ones(2), text[:2], torch.ones(2))
    assert guided.finite.tolist() == [True, True, False]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_corrected_step_equals_the_reverse_step_from_the_moved_x_0(
    clip: Clip, text: Tensor, sampler: Sampler, tmp_path: Path
) -> None:
    loaded = load(tiny_checkpoint(tmp_path))
    generator = torch.Generator().manual_seed(3)
    plan = make_plan(loaded.schedule, sampler, 10)
    x_t, x_0_prev, z = torch.randn(3, 10, 1, 28, 28, generator=generator)
    x_0 = images(10)
    x_prev = reverse_step(x_t, x_0, x_0_prev, z, plan.coefficients)
    flags = torch.ones(10, dtype=torch.bool)
    scale, rows = torch.ones(10), torch.arange(10)
    guided = guide_with_clip(clip, Stepped(x_prev, x_0, rows, flags), rows, plan.coefficients[:, 1], text, scale)
    expected = reverse_step(x_t, guided.x_0, x_0_prev, z, plan.coefficients)
    torch.testing.assert_close(guided.x_prev, expected, rtol=1e-5, atol=1e-5)


def test_process_is_guided_only_within_the_interval(clip: Clip, text: Tensor, tmp_path: Path) -> None:
    """Compares x_t before the interval, and the similarity at the end."""
    loaded = load(tiny_checkpoint(tmp_path))
    program = ReverseStep(loaded, torch.device("cpu"), torch.float32)
    plan, rows = make_plan(loaded.schedule, "ddpm", 20), torch.arange(4)
    seen: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}

    def run(is_guided: bool) -> Tensor:
        guided = ClipGuidedStep(program, clip, ClipGuidance(1.0, 5, 60), text[rows])
        return draw(
            guided if is_guided else program,
            [plan] * 4,
            loaded.image_shape,
            seed=torch.zeros_like(rows),
            index=rows,
            y=rows,
            null_label=loaded.network.null_label,
            guidance=Guidance(2.0),
            on_step=lambda k, x_t, x_0: seen[is_guided].update({plan.timesteps[k]: x_t.clone()}),
        )

    plain, guided = run(False), run(True)
    differing = {t for t in seen[True] if not torch.equal(seen[True][t], seen[False][t])}
    assert differing == {t for t in plan.timesteps[:-1] if t < 60}
    similarity = [(clip.embed_images(x) * text[rows]).sum(dim=1).mean() for x in (plain, guided)]
    assert similarity[1] > similarity[0]


def test_row_keeps_its_prompt_after_another_row_has_ended(clip: Clip, text: Tensor, tmp_path: Path) -> None:
    loaded = load(tiny_checkpoint(tmp_path))
    program = ReverseStep(loaded, torch.device("cpu"), torch.float32)
    short, long = (make_plan(loaded.schedule, "ddim", num_steps) for num_steps in (2, 10))

    def run(rows: list[int]) -> Tensor:
        """Returns the image of the last row."""
        guided, index = ClipGuidedStep(program, clip, ClipGuidance(3.0, 1, 100), text[rows]), torch.tensor(rows)
        plans = [*[short] * (len(rows) - 1), long]
        drawn = draw(guided, plans, loaded.image_shape, seed=0 * index, index=0 * index, y=0 * index)
        return drawn[-1]

    alone, together, other = run([1]), run([0, 1]), run([0])
    assert (alone - together).abs().mean() < 1e-3 < (alone - other).abs().mean()


def test_guidance_acts_within_the_interval_unless_the_scale_is_0() -> None:
    assert [ClipGuidance(1.0, 5, 60).acts_at(t) for t in (4, 5, 60, 61)] == [False, True, True, False]
    assert not ClipGuidance(0.0, 5, 60).acts_at(30)
    assert ClipGuidance(1.0, 5, 60).steps_within([100, 60, 30, 4]) == {1, 2}


@pytest.mark.parametrize("values", [(-0.1, 1, 2), (10.5, 1, 2), (1, 0, 2), (1, 3, 2), (float("nan"), 1, 2)])
def test_invalid_guidance_raises(values: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="clip_guidance"):
        ClipGuidance(*values)
