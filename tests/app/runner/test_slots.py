"""Slots and faults: a row that fails leaves the others and their state alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from app.device import DeviceLostError, OutOfMemoryError, device_errors
from model.checkpoint import Checkpoint
from tests.app.runner.rows import draw, equal, new_runner, rows_of, step


def test_slots_grow_with_the_rows_and_are_given_back(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    rows = rows_of(150, num_steps=3)
    expected = draw(runner, rows_of(150, num_steps=3), max_batch=8)
    step(runner, rows[:50])
    step(runner, rows[50:])  # the state of the first fifty moves to a larger place
    assert len({row.slot for row in rows}) == 150
    assert equal(draw(runner, rows), expected)
    assert all(row.slot is None for row in rows)
    size = len(runner._slots.state.seed)
    for _ in range(5):
        draw(runner, rows_of(150, num_steps=1))
    assert len(runner._slots.state.seed) == size


def test_releasing_twice_gives_one_slot_back(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    row = rows_of()
    step(runner, row)
    runner.release(row)
    runner.release(row)
    others = rows_of(64)
    step(runner, others)
    assert len({other.slot for other in others}) == 64


def test_a_row_of_nan_leaves_the_others_alone(loaded: Checkpoint) -> None:
    healthy = draw(new_runner(loaded), [*rows_of(digit=2), *rows_of(digit=4, guidance_scale=1.5)])
    broken = dataclasses.replace(loaded)
    broken.network.class_embed.weight[3] = torch.nan
    runner = new_runner(broken)
    rows = [*rows_of(digit=2), *rows_of(digit=3), *rows_of(digit=4, guidance_scale=1.5)]
    for _ in range(5):
        assert step(runner, rows) == [True, False, True]
    images = runner.pixels([rows[0], rows[2]])
    assert equal(images, healthy)


def test_a_step_that_raises_has_changed_nothing(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    expected = draw(runner, rows_of(3, num_steps=4))
    rows = rows_of(3, num_steps=4)
    step(runner, rows[:2])
    program = runner._networks["default"].program
    denoise = program.denoise

    def fail(x: Tensor, c: Tensor) -> Tensor:
        raise RuntimeError

    program.denoise = fail
    with pytest.raises(RuntimeError):
        runner.step(rows)
    program.denoise = denoise
    assert equal(draw(runner, rows), expected)


def test_an_image_that_has_not_begun_is_black(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    rows = rows_of(3)
    step(runner, rows[1:2])
    images = runner.pixels(rows)
    assert not images[0].any()
    assert images[1].any()
    assert not images[2].any()
    channels, size = loaded.image_shape[:2]
    assert images[0].shape == images[1].shape == ((size, size) if channels == 1 else (size, size, channels))


@pytest.mark.parametrize(
    ("raised", "understood"),
    [
        (torch.OutOfMemoryError("x"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (torch.AcceleratorError("a\nb"), DeviceLostError),
        (RuntimeError("x"), RuntimeError),
    ],
)
def test_what_the_device_raises_is_translated(raised: Exception, understood: type[Exception]) -> None:
    with pytest.raises(understood), device_errors():
        raise raised


def test_a_row_whose_beginning_failed_begins_anew(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot may hold what another image left there."""
    runner = new_runner(loaded)
    expected = draw(runner, rows_of(4, seed=5))
    rows, write = rows_of(4, seed=5), runner._slots.write

    def fail(*args: object, **named: object) -> None:
        monkeypatch.setattr(runner._slots, "write", write)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner._slots, "write", fail)
    with pytest.raises(OutOfMemoryError):
        runner.step(rows)
    assert all(row.slot is None for row in rows)
    assert all(np.array_equal(a, b) for a, b in zip(draw(runner, rows), expected, strict=True))


def test_a_step_that_was_written_in_part_is_never_run_again(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, rows = new_runner(loaded), rows_of(2)
    step(runner, rows)

    def fail(*args: object, **named: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner._slots, "write", fail)
    with pytest.raises(DeviceLostError):
        runner.step(rows)
