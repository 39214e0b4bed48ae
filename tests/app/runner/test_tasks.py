"""Rows that start from images, keep known pixels, search for the digit or recognise an image."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch

from app.engine.interface import OutOfMemoryError
from app.engine.job import StepRows, Trajectory
from model.checkpoint import Checkpoint
from model.inpainting import ClassDistances
from model.pixels import to_pixels
from model.process import Start, compare, draw, recognise
from model.sampler import plan_through
from model.spec import Guidance
from tests.app.runner.rows import DTYPES, GREY_AND_COLOUR, GUIDANCE, new_runner
from tests.app.runner.task_rows import (
    NUM_PAIRS,
    Outcome,
    all_rows,
    drawings,
    edit_rows,
    finish,
    inpaint_rows,
    noisy_search_rows,
    recognition_rows,
    search_rows,
    task_rows,
)
from tests.app.runner.test_device_state import OutOfMemoryAt

BATCHES = [(64, None), (64, 1), (7, 2)]  # rows in a step, and the seed of their order


def pixels_of(images: torch.Tensor) -> bytes:
    """Returns the 8-bit pixels of one image (1, C, H, W), in the layout of a PNG file."""
    return bytes(to_pixels(images)[0].permute(1, 2, 0).contiguous().numpy().tobytes())


@GREY_AND_COLOUR
@DTYPES
def test_row_of_any_task_has_the_same_values_alone_and_in_any_batch(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner = new_runner(loaded, dtype)
    info = runner.models["default"]
    expected = [finish(runner, [row])[0] for row in all_rows(info)]
    with_errors = [errors for _, errors in expected if errors]
    assert len(set(with_errors)) == len(with_errors) == 4  # two searches and two recognitions
    for max_batch, order in BATCHES:
        assert finish(runner, all_rows(info), max_batch, order) == expected


@DTYPES
def test_generated_images_keep_their_bits_if_rows_of_other_tasks_share_their_steps(
    loaded: Checkpoint, dtype: torch.dtype
) -> None:
    runner = new_runner(loaded, dtype)
    rows = all_rows(runner.models["default"])
    is_drawing = [not row.input for row in rows]
    shared = finish(runner, rows, order=1)
    expected = finish(runner, drawings(runner.models["default"]))
    assert [outcome for outcome, is_drawn in zip(shared, is_drawing, strict=True) if is_drawn] == expected


@GREY_AND_COLOUR
def test_known_pixels_do_not_change_the_next_row_in_their_slot(loaded: Checkpoint) -> None:
    used, fresh = new_runner(loaded), new_runner(loaded)
    info = used.models["default"]
    expected = finish(fresh, drawings(info))
    known = [row for seed in range(8) for row in inpaint_rows(info, seed, count=8)]
    used.step(StepRows.of(known))
    slots = {row.slots for row in known}
    used.release(known)
    rows = drawings(info)
    used.step(StepRows.of(rows))
    assert {row.slots for row in rows} <= slots
    for row in rows:
        row.step += 1
    assert finish(used, rows) == expected


@GREY_AND_COLOUR
@DTYPES
@pytest.mark.parametrize("seed", [3, 4, 5], ids=["ddpm", "ddim", "dpmpp"])
@pytest.mark.parametrize("make", [edit_rows, inpaint_rows])
def test_row_with_an_input_equals_the_offline_process(
    loaded: Checkpoint, dtype: torch.dtype, make: Callable[..., list[Trajectory]], seed: int
) -> None:
    runner = new_runner(loaded, dtype)
    rows = make(runner.models["default"], seed, count=2, scale=2.0)
    for index, (pixels, _) in enumerate(finish(runner, rows)):
        options, given = rows[index].options, rows[index].input
        assert given
        is_known = None if given.is_known is None else torch.from_numpy(given.is_known)[None]
        image = torch.from_numpy(given.image)[None]
        x_0 = draw(
            runner._models["default"].program,
            [plan_through(loaded.schedule, options.sampler, options.path)],
            loaded.image_shape,
            seed=torch.tensor([options.seed]),
            index=torch.tensor([index]),
            y=torch.tensor([options.label]),
            null_label=loaded.network.null_label,
            guidance=Guidance(options.guidance_scale, GUIDANCE.start, GUIDANCE.stop),
            start=Start(image, torch.tensor([given.signal]), torch.tensor([given.noise]), is_known),
        )  # (1, C, H, W)
        assert pixels == pixels_of(x_0)
        if is_known is not None:
            assert torch.equal(x_0[is_known], image[is_known])


@GREY_AND_COLOUR
def test_errors_of_a_recognition_row_equal_those_of_the_offline_classifier(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    info = runner.models["default"]
    (row,) = recognition_rows(info, seed=9)
    ((pixels, errors),) = finish(runner, [row])
    assert row.input
    assert row.comparison
    image = torch.from_numpy(row.input.image)[None]
    (expected,) = recognise(runner._models["default"].program, info.schedule, image, info.readout, NUM_PAIRS)
    assert len(errors) == len(expected.errors)
    for of_row, of_classes in zip(errors, expected.errors, strict=True):
        assert of_row == pytest.approx(list(of_classes.values()), rel=1e-3)
    assert row.comparison.label == expected.label
    assert pixels == pixels_of(image)


@GREY_AND_COLOUR
@pytest.mark.parametrize("make", [search_rows, noisy_search_rows])
def test_errors_of_a_search_equal_those_of_the_offline_search(
    loaded: Checkpoint, make: Callable[..., list[Trajectory]]
) -> None:
    runner = new_runner(loaded)
    (row,) = make(runner.models["default"], seed=8)
    unused = deepcopy(row.comparison)
    finish(runner, [row])
    options, given, comparison = row.options, row.input, row.comparison
    assert given
    assert given.is_known is not None
    assert unused
    compare(
        runner._models["default"].program,
        [plan_through(loaded.schedule, options.sampler, options.path)],
        [unused],
        seed=torch.tensor([options.seed]),
        index=torch.tensor([0]),
        start=Start(
            torch.from_numpy(given.image)[None],
            torch.tensor([given.signal]),
            torch.tensor([given.noise]),
            torch.from_numpy(given.is_known)[None],
        ),
    )
    sums = [each.distances if isinstance(each, ClassDistances) else each.sums for each in (comparison, unused)]  # type: ignore[union-attr]
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)
    assert comparison.label == unused.label  # type: ignore[union-attr]
    assert len({each for each in sums[0] if each < float("inf")}) > 1


def test_out_of_memory_while_rows_with_inputs_begin_changes_no_row(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    info = runner.models["default"]

    def earlier() -> list[Trajectory]:
        return [*edit_rows(info, 3), *inpaint_rows(info, 5), *recognition_rows(info, 9)]

    def later() -> list[Trajectory]:
        return [*edit_rows(info, 4, t=30), *inpaint_rows(info, 6), *recognition_rows(info, 10, 5)]

    expected = finish(runner, earlier())
    rows, new_rows, failed = earlier(), later(), 0
    runner.step(StepRows.of(rows))
    with torch.inference_mode():
        while True:
            try:
                with OutOfMemoryAt(failed):
                    runner._begin(new_rows)
            except torch.OutOfMemoryError:
                assert not any(row.slots for row in new_rows)
                failed += 1
            else:
                break
    assert failed > 30
    slots = [slot for row in rows + new_rows for slot in row.slots]
    assert len(set(slots)) == len(slots) == len(rows + new_rows)
    first = runner.errors(rows[-1:]).wait()
    for row in rows:
        row.step += 1
    rows[-1].comparison.add(first[0])  # type: ignore[union-attr] # the last row recognises an image
    outcomes = finish(runner, rows + new_rows)
    assert outcomes[:2] == expected[:2]
    assert (outcomes[2][0], (tuple(first[0]), *outcomes[2][1])) == expected[2]
    assert outcomes[3:] == finish(runner, later())


def test_step_that_fails_keeps_the_errors_of_the_step_before(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = new_runner(loaded)
    rows = recognition_rows(runner.models["default"], seed=9)
    expected = finish(runner, recognition_rows(runner.models["default"], seed=9))
    runner.step(StepRows.of(rows))
    before = runner.errors(rows).wait()

    def fail(*parts: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runner._models["default"].program, "denoise", fail)
        with pytest.raises(OutOfMemoryError):
            runner.step(StepRows.of(rows))
    assert runner.errors(rows).wait() == before
    assert tuple(before[0]) == expected[0][1][0]


def test_row_with_nan_does_not_change_rows_with_known_pixels(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    info = runner.models["default"]
    healthy = finish(runner, inpaint_rows(info, 6))
    loaded.network.class_embed.weight[3] = torch.nan
    broken = new_runner(loaded)
    faulty, rows = edit_rows(info, 3), inpaint_rows(info, 6)
    recognised = recognition_rows(info, 9)
    assert broken.step(StepRows.of([*faulty, *rows, *recognised])) == faulty
    errors = broken.errors(recognised).wait()[0]
    assert [place for place, error in enumerate(errors) if not np.isfinite(error)] == [3]
    for row in rows:
        row.step += 1
    assert finish(broken, rows) == healthy


def test_input_of_a_row_is_not_changed_by_its_steps(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    rows = task_rows(runner.models["default"])
    before = [row.input.image.copy() for row in rows if row.input]
    finish(runner, rows)
    after = [row.input.image for row in rows if row.input]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_two_recognitions_of_an_image_give_the_same_errors_in_one_step(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    info = runner.models["default"]
    outcomes: list[Outcome] = finish(runner, [row for _ in range(3) for row in recognition_rows(info, 9)])
    assert len(set(outcomes)) == 1
