"""Tests of the slots, of the table of plans, and of failures, which must not change other rows."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.engine.interface import DeviceLostError, OutOfMemoryError
from app.engine.job import Options, StepRows, Trajectory
from app.runner.device import device_errors
from app.runner.device_state import Plans, Slots
from app.runner.transfers import Transfers
from model.checkpoint import Checkpoint
from model.pixels import to_pixels
from model.process import draw as draw_alone
from model.sampler import Plan, make_plan, plan_through
from model.schedule import Schedule, ScheduleConfig
from model.spec import Process
from model.step import ReverseStep
from tests.app.runner.rows import CPU, GREY_AND_COLOUR, draw, equal, new_runner, rows_of, step

SCHEDULE = Schedule(ScheduleConfig())


@GREY_AND_COLOUR
def test_slots_grow_and_are_reused_after_release(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    rows = rows_of(150, num_steps=3)
    expected = draw(runner, rows_of(150, num_steps=3), max_batch=8)
    step(runner, rows[:50])
    step(runner, rows[50:])  # The state of the first 50 rows is copied to larger tensors.
    assert len({row.slots for row in rows}) == 150
    assert equal(draw(runner, rows), expected)
    assert not any(row.slots for row in rows)
    size = len(runner._slots["default"].state.seed)
    for _ in range(5):
        draw(runner, rows_of(150, num_steps=1))
    assert len(runner._slots["default"].state.seed) == size


def test_second_release_of_a_row_has_no_effect(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    row = rows_of()
    step(runner, row)
    runner.release(row)
    runner.release(row)
    others = rows_of(64)
    step(runner, others)
    assert len({other.slots for other in others}) == 64


def test_row_with_nan_does_not_change_other_rows(loaded: Checkpoint) -> None:
    healthy = draw(new_runner(loaded), [*rows_of(digit=2), *rows_of(digit=4, guidance_scale=1.5)])
    broken = dataclasses.replace(loaded)
    broken.network.class_embed.weight[3] = torch.nan
    runner = new_runner(broken)
    rows = [*rows_of(digit=2), *rows_of(digit=3), *rows_of(digit=4, guidance_scale=1.5)]
    for _ in range(5):
        assert step(runner, rows) == [True, False, True]
    images = runner.pixels([rows[0], rows[2]]).wait()
    assert equal(images, healthy)


def test_step_that_raises_does_not_change_the_state(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    expected = draw(runner, rows_of(3, num_steps=4))
    rows = rows_of(3, num_steps=4)
    step(runner, rows[:2])
    program = runner._models["default"].program
    denoise = program.denoise

    def fail(x: Tensor, c: Tensor) -> Tensor:
        raise RuntimeError

    program.denoise = fail
    with pytest.raises(RuntimeError):
        runner.step(StepRows.of(rows))
    program.denoise = denoise
    assert equal(draw(runner, rows), expected)


@GREY_AND_COLOUR
def test_image_without_a_step_is_black(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    rows = rows_of(3)
    step(runner, rows[1:2])
    images = runner.pixels(rows).wait()
    assert not images[0].any()
    assert images[1].any()
    assert not images[2].any()
    channels, size = loaded.image_shape[:2]
    assert images[0].shape == images[1].shape == ((size, size) if channels == 1 else (size, size, channels))


@GREY_AND_COLOUR
def test_x_t_is_that_of_the_reverse_process_and_equals_the_image_after_the_last_step(loaded: Checkpoint) -> None:
    num_steps, index = 5, torch.arange(2)
    expected: list[Tensor] = []  # x_t before each step
    draw_alone(
        ReverseStep(loaded, CPU, torch.float32),
        [make_plan(loaded.schedule, "ddpm", num_steps)] * 2,
        loaded.image_shape,
        seed=torch.ones_like(index),
        index=index,
        y=torch.full_like(index, 3),
        on_step=lambda k, x_t, x_0: expected.append(to_pixels(x_t)),
    )
    runner, rows = new_runner(loaded), rows_of(2, num_steps=num_steps)
    layout = "b 1 h w -> b h w" if loaded.image_shape[0] == 1 else "b c h w -> b h w c"
    for x_t in expected[1:]:
        step(runner, rows)
        read = np.stack([own for _, own in runner.pixels_with_x_t(rows).wait()])
        np.testing.assert_allclose(read, rearrange(x_t, layout).numpy(), atol=1)
        assert equal([x_0 for x_0, _ in runner.pixels_with_x_t(rows).wait()], runner.pixels(rows).wait())
    step(runner, rows)
    for x_0, own in runner.pixels_with_x_t(rows).wait():
        np.testing.assert_array_equal(x_0, own)


@GREY_AND_COLOUR
def test_x_t_of_an_image_without_a_step_is_black(loaded: Checkpoint) -> None:
    runner, rows = new_runner(loaded), rows_of(3)
    step(runner, rows[1:2])
    assert [[image.any() for image in images] for images in runner.pixels_with_x_t(rows).wait()] == [
        [False, False],
        [True, True],
        [False, False],
    ]


@pytest.mark.parametrize(
    ("raised", "translated"),
    [
        (torch.OutOfMemoryError("x"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (torch.AcceleratorError("a\nb"), DeviceLostError),
        (RuntimeError("x"), RuntimeError),
    ],
)
def test_device_errors_are_translated(raised: Exception, translated: type[Exception]) -> None:
    with pytest.raises(translated), device_errors():
        raise raised


def test_row_can_start_again_after_its_start_failed(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot may contain the state of an earlier image."""
    runner = new_runner(loaded)
    expected = draw(runner, rows_of(4, seed=5))
    rows, write = rows_of(4, seed=5), runner._slots["default"].write

    def fail(*args: object, **named: object) -> None:
        monkeypatch.setattr(runner._slots["default"], "write", write)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner._slots["default"], "write", fail)
    with pytest.raises(OutOfMemoryError):
        runner.step(StepRows.of(rows))
    assert not any(row.slots for row in rows)
    assert all(np.array_equal(a, b) for a, b in zip(draw(runner, rows), expected, strict=True))


WRITE = "aten.index_copy_.default"
READS = {f"aten.{name}.default" for name in ("resolve_conj", "resolve_neg", "_local_scalar_dense")}  # tolist()


class OutOfMemoryAt(TorchDispatchMode):
    """Counts tensor operations, and raises an out-of-memory error in the operation with this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0
        self.calls = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        self.calls[str(func)] += 1
        self.last = str(func)
        if self.count - 1 == self.number:
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


def test_out_of_memory_in_a_step_keeps_the_state_or_raises_device_lost(loaded: Checkpoint) -> None:
    """All memory is allocated before the first write. DeviceLostError is raised only by a later write or read."""
    runner, rows = new_runner(loaded), rows_of(2, num_steps=2)
    step(runner, rows)
    parts = [*runner._slots["default"].state]
    before = [part.clone() for part in parts]
    with OutOfMemoryAt(-1) as counted, torch.inference_mode():
        runner.step(StepRows.of(rows))
    assert counted.calls[WRITE] == 2  # one write each for x_t and x_0
    device_lost_after = Counter[str]()
    for number in range(counted.count):
        with torch.inference_mode():
            for part, value_before in zip(parts, before, strict=True):
                part.copy_(value_before)
        with pytest.raises((OutOfMemoryError, DeviceLostError)) as raised, OutOfMemoryAt(number) as mode:
            runner.step(StepRows.of(rows))
        if raised.type is DeviceLostError:
            device_lost_after[mode.last] += 1
        else:
            assert all(torch.equal(part, value_before) for part, value_before in zip(parts, before, strict=True))
    assert device_lost_after.pop(WRITE) == 1  # the second write
    assert set(device_lost_after) <= READS  # the operations that read the flags on the host


def test_out_of_memory_while_slots_grow_does_not_change_them(loaded: Checkpoint) -> None:
    def attempt(slots: Slots, rows: list[Trajectory], number: int) -> int:
        """Returns the number of operations."""
        images, seed = torch.ones(len(rows), *loaded.image_shape), torch.arange(len(rows))
        with OutOfMemoryAt(number) as mode:
            slots.begin(rows, x_t=images, seed=seed)
        return mode.count

    def new_slots() -> Slots:
        return Slots(1, loaded.image_shape, CPU, Transfers(CPU))

    for number in range(attempt(new_slots(), rows_of(3), -1)):
        slots, rows = new_slots(), rows_of(3)
        with pytest.raises(torch.OutOfMemoryError):
            attempt(slots, rows, number)
        assert not any(row.slots for row in rows)
        attempt(slots, rows, -1)
        assert slots.state.seed[[row.slots[0] for row in rows]].tolist() == [0, 1, 2]
        assert len(slots.error) == len(slots.state.seed) == 1 + len(slots._free) + len(rows)


@pytest.mark.parametrize(("num_writes", "expected"), [(0, OutOfMemoryError), (1, DeviceLostError)])
def test_failed_write_raises_device_lost_only_after_another_write(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, num_writes: int, expected: type[Exception]
) -> None:
    runner, rows = new_runner(loaded), rows_of(2)
    step(runner, rows)
    write, done = runner._slots["default"].write, list[Tensor]()

    def fail(slots: Tensor, **named: Tensor) -> None:
        if len(done) == num_writes:
            raise torch.OutOfMemoryError
        done.append(slots)
        write(slots, **named)

    monkeypatch.setattr(runner._slots["default"], "write", fail)
    with pytest.raises(expected):
        runner.step(StepRows.of(rows))


def test_copy_of_finite_flags_is_allocated_before_state_is_written(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy needs pinned memory, which can run out."""
    runner, rows = new_runner(loaded), rows_of(2, num_steps=1)
    expected = draw(new_runner(loaded), rows_of(2, num_steps=1))
    start_download = runner._transfers.start_download

    def fail(tensor: Tensor) -> Callable[[], Tensor]:
        monkeypatch.setattr(runner._transfers, "start_download", start_download)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner._transfers, "start_download", fail)
    with pytest.raises(OutOfMemoryError):
        runner.step(StepRows.of(rows))
    assert equal(draw(runner, rows), expected)


def test_error_of_an_enqueued_step_raises_device_lost(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = new_runner(loaded)

    def wait() -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner._transfers, "start_download", lambda tensor: wait)
    with pytest.raises(DeviceLostError):
        runner.step(StepRows.of(rows_of(2, num_steps=1)))


def options(num_steps: int, model: str = "default") -> Options:
    return Options(0, 0, num_steps, "ddim", 1.0, model)


def plan_of(process: Process, num_steps: int, path: Sequence[int]) -> Plan:
    return plan_through(SCHEDULE, process, path) if path else make_plan(SCHEDULE, process, num_steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("first_rows", [4, 1000])
def test_start_of_a_plan_does_not_change_when_other_plans_are_added(first_rows: int) -> None:
    table = Plans(CPU, first_rows)
    starts = {num_steps: table.start_of(options(num_steps), plan_of) for num_steps in (7, 100, 1, 30)}
    for num_steps, start in starts.items():
        expected = make_plan(SCHEDULE, "ddim", num_steps).table(CPU)
        assert torch.equal(table.table[start : start + num_steps], expected)


def test_plan_of_each_model_is_made_once() -> None:
    table = Plans(CPU)
    first = table.start_of(options(10), plan_of)
    assert table.start_of(options(10), plan_of) == first
    assert table.start_of(options(10, "fast"), plan_of) == first + 10


def test_table_of_plans_has_room_for_all_plans_with_up_to_100_steps() -> None:
    table = Plans(CPU)
    size = len(table.table)
    for sampler in ("ddpm", "ddim", "dpmpp"):
        for num_steps in range(1, 101):
            table.start_of(Options(0, 0, num_steps, sampler, 1.0), plan_of)
    assert len(table.table) == size
