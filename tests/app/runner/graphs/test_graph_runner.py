"""Compares the graph runner on a late device with the runner of a CPU, bit by bit."""

import copy
import gc
import random
import weakref
from collections.abc import Callable, Hashable

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.interface import DeviceLostError, OutOfMemoryError, RunnerError
from app.engine.job import ClipTarget, Job, JobRequest, Options, StepRows, Trajectory
from app.engine.step_times import StepTimes
from app.runner.graphs import graph_runner, new_rows
from app.runner.graphs.graph_calls import GraphCalls
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.graphs.new_rows import NewRows
from app.runner.graphs.row_state import GraphSlots
from app.runner.graphs.shapes import Shape, shapes_to_compile
from app.runner.graphs.step_inputs import Call
from app.runner.runner import Runner
from model.checkpoint import Checkpoint
from model.compiled.compiler import CompilerError
from model.spec import SAMPLERS
from model.step import Rows, State, Stepped
from tests.app.runner.late_device import LateDevice, LateGraph
from tests.app.runner.rows import GREY_AND_COLOUR, draw, equal, mixed_rows, new_runner, rows_of, step

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def on_graphs(loaded: Checkpoint, dtype: torch.dtype = torch.float32, seed: int = 0, **options: int) -> GraphRunner:
    options = {"num_slots": 64, "most_rows": 8, **options}
    return GraphRunner({"default": copy.deepcopy(loaded)}, LateDevice(seed), dtype, **options)


def out_of_memory(*arguments: object) -> None:
    raise torch.OutOfMemoryError


@GREY_AND_COLOUR
@DTYPES
@pytest.mark.parametrize("max_batch", [64, 7, 1])
def test_images_are_those_of_the_cpu_runner(loaded: Checkpoint, dtype: torch.dtype, max_batch: int) -> None:
    expected = draw(new_runner(copy.deepcopy(loaded), dtype), mixed_rows())
    assert equal(draw(on_graphs(loaded, dtype, max_batch), mixed_rows(), max_batch), expected)


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_join_and_leave_at_random_have_the_bits_of_the_cpu_runner(loaded: Checkpoint, seed: int) -> None:
    choose, runner = random.Random(seed), on_graphs(loaded, seed=seed)
    rows = mixed_rows()
    expected = dict(zip(rows, draw(new_runner(loaded), rows), strict=True))
    for row in rows:
        row.step = 0
    readings = []
    while left := [row for row in rows if row.steps_left]:
        chosen = choose.sample(left, choose.randint(1, len(left)))
        assert all(step(runner, chosen))
        ended = [row for row in chosen if not row.steps_left]
        readings.append((ended, runner.pixels(ended)))
        runner.release(ended)  # the slots are used again before the device has read them
    for ended, reading in readings:
        assert equal(reading.wait(), [expected[row] for row in ended])


def test_host_waits_only_to_limit_the_steps_ahead(loaded: Checkpoint) -> None:
    device = LateDevice(most_queued=10**6)  # does nothing on its own
    runner = GraphRunner({"default": loaded}, device, torch.float32, num_slots=64, most_rows=8)
    short, long = rows_of(3, num_steps=2), rows_of(2, num_steps=20)
    step(runner, [*short, *long])
    device.synchronize()
    before = device.num_waits
    step(runner, [*short, *long])
    reading = runner.pixels(short)
    runner.release(short)
    assert device.num_waits == before
    assert not reading.is_ready()
    for k in range(3, 12):
        step(runner, long)
        assert device.num_waits - before == max(0, k - 4)  # the capture of a graph in step 3 has done all work
    assert reading.is_ready()


def test_row_with_nan_fails_alone_when_it_is_read(loaded: Checkpoint) -> None:
    loaded.network.class_embed.weight[3] = torch.nan
    runner = on_graphs(loaded)
    rows = [*rows_of(digit=2, num_steps=3), *rows_of(digit=3, num_steps=3), *rows_of(digit=4, num_steps=4)]
    for _ in range(3):
        assert step(runner, rows) == [True] * 3
    images = runner.pixels(rows).wait()
    assert [image is None for image in images] == [False, True, False]
    runner.release(rows)
    healthy = rows_of(3, digit=2, num_steps=2)  # One of these slots was used by a row with NaN.
    for _ in range(2):
        step(runner, healthy)
    assert all(image is not None for image in runner.pixels(healthy).wait())


def test_row_with_an_infinite_prediction_in_an_earlier_step_fails_alone(loaded: Checkpoint) -> None:
    """The clipped x_0 of such a step is finite. So are all values of the later steps, although the image is wrong."""
    loaded.network.final_conv[0].weight *= 100  # type: ignore[index, operator]

    def rows() -> list[Trajectory]:  # The first one overflows in guided steps.
        return [*rows_of(num_steps=10, guidance_scale=3e38), *rows_of(num_steps=10)]

    of_cpu, of_graphs, runner, expected = rows(), rows(), on_graphs(loaded), new_runner(copy.deepcopy(loaded))
    guided, other = zip(*(step(expected, of_cpu) for _ in range(10)), strict=True)
    assert (set(guided[2:-1]), guided[-1], set(other)) == ({False}, True, {True})
    for _ in range(10):
        step(runner, of_graphs)
    assert [image is None for image in runner.pixels(of_graphs).wait()] == [True, False]


def with_noise_of_five_steps(loaded: Checkpoint) -> GraphRunner:
    runner = on_graphs(loaded)
    slots = runner._slots["default"]
    slots.noise_steps = 5
    assert slots.state.noise is not None
    slots.state.noise = slots.state.noise[:, :6].contiguous()  # that of x_T and of five steps
    return runner


@pytest.mark.parametrize("num_steps", [4, 5, 6, 7, 10, 11, 12])
def test_noise_of_long_paths_is_drawn_again(loaded: Checkpoint, num_steps: int) -> None:
    expected = draw(new_runner(loaded), rows_of(3, num_steps=num_steps))
    assert equal(draw(with_noise_of_five_steps(loaded), rows_of(3, num_steps=num_steps)), expected)


def test_steps_of_the_same_rows_use_the_noise_that_is_drawn_again(loaded: Checkpoint) -> None:
    expected, runner = draw(new_runner(loaded), rows_of(3, num_steps=12)), with_noise_of_five_steps(loaded)
    rows, sizes = rows_of(3, num_steps=12), np.array([1, 1, 1])
    for k in range(12):
        runner.step(StepRows(rows, np.full(3, k), sizes))
    assert equal(runner.pixels(rows).wait(), expected)


def test_many_rows_are_begun_in_parts(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> list[Trajectory]:
        scales = 1.5, 3.0
        return [row for scale in scales for row in rows_of(10, num_steps=15, guidance_scale=scale)]  # 300 noise images

    expected = draw(new_runner(loaded), rows())
    monkeypatch.setattr(new_rows, "MOST_DRAWS", 128)
    monkeypatch.setattr(new_rows, "MOST_ROWS", 8)
    assert equal(draw(on_graphs(loaded), rows()), expected)


def test_step_can_be_repeated_if_drawing_its_noise_fails(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(new_runner(loaded), rows_of(3, num_steps=12))
    runner, rows, draw_noise = with_noise_of_five_steps(loaded), rows_of(3, num_steps=12), NewRows._draw
    for k in range(12):
        if k == 5:
            monkeypatch.setattr(NewRows, "_draw", out_of_memory)
            with pytest.raises(OutOfMemoryError):
                step(runner, rows)
            monkeypatch.setattr(NewRows, "_draw", draw_noise)
            for row in rows:
                row.step = k
        assert all(step(runner, rows))
    assert equal(runner.pixels(rows).wait(), expected)


def test_noise_of_a_long_path_is_drawn_once_even_if_a_step_is_repeated(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_drawn, draw_noise, call = 0, NewRows._draw, GraphCalls.call

    def count(new: NewRows, draws: np.ndarray) -> None:
        nonlocal num_drawn
        num_drawn += draws.shape[1]
        draw_noise(new, draws)

    def fail_step(calls: GraphCalls, key: object, *parts: object) -> None:
        if isinstance(key, tuple):  # the graph of a step
            raise torch.OutOfMemoryError
        call(calls, key, *parts)  # type: ignore[arg-type]

    runner, rows = with_noise_of_five_steps(loaded), rows_of(3, num_steps=12)
    monkeypatch.setattr(NewRows, "_draw", count)
    for k in range(12):
        if k == 5:  # The noise is drawn before this step.
            monkeypatch.setattr(GraphCalls, "call", fail_step)
            with pytest.raises(OutOfMemoryError):
                runner.step(StepRows.of(rows))
            monkeypatch.setattr(GraphCalls, "call", call)
        step(runner, rows)
    assert num_drawn == 3 * (1 + 11)  # that of x_T, and of all steps but the last one, which adds none


def test_step_after_a_failed_growth_uses_no_outdated_graph(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, rows, grow = on_graphs(loaded, num_slots=2), rows_of(2, num_steps=6), GraphSlots._grow
    expected = draw(new_runner(loaded), rows_of(2, num_steps=6))
    step(runner, rows)

    def grow_once(slots: GraphSlots) -> None:
        if len(slots.finite) > 3:
            raise torch.OutOfMemoryError
        grow(slots)

    monkeypatch.setattr(GraphSlots, "_grow", grow_once)
    with pytest.raises(OutOfMemoryError):
        runner.step(StepRows.of([*rows, *rows_of(20, num_steps=6)]))
    for _ in range(5):
        step(runner, rows)
    assert equal(runner.pixels(rows).wait(), expected)


def test_failure_after_a_step_is_enqueued_loses_the_device(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated step would change the rows twice."""
    runner = on_graphs(loaded)
    target = ClipTarget(1.0, np.zeros(4, np.float32), range(5), 3)
    rows = Job(JobRequest(Options(3, 1, 5, "ddpm", 1.0, clip_guidance_scale=1.0), 2, clip=target)).unfinished
    monkeypatch.setattr(GraphRunner, "_guide", out_of_memory)
    with pytest.raises(DeviceLostError, match="only a part of a step"):
        runner.step(StepRows.of(rows))


@GREY_AND_COLOUR
def test_graphs_are_captured_again_after_the_slots_have_grown(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded, num_slots=2)
    rows = [*rows_of(2, num_steps=6), *rows_of(3, num_steps=4, seed=5)]
    expected = draw(new_runner(loaded), [*rows_of(2, num_steps=6), *rows_of(3, num_steps=4, seed=5)])
    step(runner, rows[:2])
    step(runner, rows[:2])
    assert equal(draw(runner, rows), expected)
    assert len(runner._slots["default"].finite) == len(runner._slots["default"].state.seed) == 6
    assert runner._slots["default"].version == 1


def test_table_of_plans_has_room_for_all_plans_of_both_models(loaded: Checkpoint, other: Checkpoint) -> None:
    """Otherwise it grows, and all graphs are captured again. Paths of /edit and /denoise start at any timestep."""
    runner = GraphRunner({"default": loaded, "fast": other}, LateDevice(), torch.float32, num_slots=2)
    rows = sum(num_steps for start in range(1, 101) for num_steps in range(1, start + 1))
    assert len(runner._plans.table) >= 2 * len(SAMPLERS) * rows


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("grows", ["plans", "slots"])
def test_removed_graphs_are_captured_again_in_idle_time(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, grows: str
) -> None:
    monkeypatch.setattr(graph_runner, "PLAN_ROWS", 128 if grows == "plans" else 1024)
    device = LateDevice()
    runner = GraphRunner({"default": loaded}, device, torch.bfloat16, num_slots=8, most_rows=2)
    runner.check = lambda: None  # type: ignore[method-assign]

    def graphs() -> list[set[Hashable]]:
        return [set(calls) for calls in (runner._steps, runner._new["default"]._draws, runner._new["default"]._starts)]

    runner.warm_up(lambda: False)
    while runner.has_idle_work:
        runner.idle()
    before, num_captures = graphs(), device.num_captures
    rows = rows_of(2, num_steps=60) if grows == "plans" else rows_of(9, num_steps=1)
    step(runner, rows[:2])
    step(runner, rows[2:] or rows)
    assert device.num_captures - num_captures <= 5  # only the graphs of these steps
    while runner.has_idle_work:
        runner.idle()
    assert all(now >= then for now, then in zip(graphs(), before, strict=True))


def test_larger_graph_is_used_until_the_exact_one_is_captured(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded)
    draw(runner, rows_of(4, num_steps=2))
    assert set(runner._steps) == {("default", Shape(4, 0, has_known=False))}
    expected = draw(new_runner(loaded), rows_of(3, num_steps=2))
    assert equal(draw(runner, rows_of(3, num_steps=2)), expected)
    assert set(runner._steps) == {("default", Shape(4, 0, has_known=False))}
    while runner.has_idle_work:
        runner.idle()
    assert ("default", Shape(3, 0, has_known=False)) in runner._steps
    assert equal(draw(runner, rows_of(3, num_steps=2)), expected)


def test_graph_is_missing_once_if_many_steps_need_it(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded)
    draw(runner, rows_of(4, num_steps=2))
    draw(runner, rows_of(3, num_steps=9))
    assert list(runner._missing) == [("default", Shape(3, 0, has_known=False))]


def test_graph_that_was_needed_last_is_captured_first(loaded: Checkpoint) -> None:
    runner, shapes = on_graphs(loaded), {rows: ("default", Shape(rows, 0, has_known=False)) for rows in (5, 6, 7)}
    for rows in (8, 7, 6, 5):
        draw(runner, rows_of(rows, num_steps=1))
    runner.idle()
    assert shapes[5] in runner._steps
    draw(runner, rows_of(7, num_steps=1))
    runner.idle()
    assert [shapes[rows] in runner._steps for rows in (6, 7)] == [False, True]


def test_larger_graph_is_not_used_after_the_slots_have_grown(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded, num_slots=4)
    draw(runner, rows_of(4, num_steps=1))
    step(runner, rows_of(3, num_steps=2))  # with the graph for 4 rows
    expected = draw(new_runner(loaded), rows_of(3, num_steps=2))
    assert equal(draw(runner, rows_of(3, num_steps=2)), expected)


def test_exact_graph_is_captured_under_load_after_many_steps_with_a_larger_one(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_runner, "MOST_LARGER_STEPS", 5)
    runner, exact = on_graphs(loaded), ("default", Shape(3, 0, has_known=False))
    draw(runner, rows_of(4, num_steps=2))
    draw(runner, rows_of(3, num_steps=5))
    assert exact not in runner._steps
    expected = draw(new_runner(loaded), rows_of(3, num_steps=4))
    assert equal(draw(runner, rows_of(3, num_steps=4)), expected)
    assert exact in runner._steps


def test_inputs_of_the_same_rows_are_computed_once(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, computed, inputs = on_graphs(loaded), list[int](), Call.inputs
    monkeypatch.setattr(Call, "inputs", lambda call, shape: computed.append(call.num_rows) or inputs(call, shape))
    rows, sizes = rows_of(3, num_steps=6), np.array([1, 1, 1])
    expected = draw(new_runner(loaded), rows_of(3, num_steps=6))
    for k in range(6):
        runner.step(StepRows(rows, np.full(3, k), sizes))
    assert equal(runner.pixels(rows).wait(), expected)
    assert computed == [3]


def test_guided_steps_of_the_same_rows_have_the_bits_of_the_cpu_runner(loaded: Checkpoint) -> None:
    expected = draw(new_runner(loaded), rows_of(3, num_steps=12, guidance_scale=2.0))
    runner, rows = on_graphs(loaded), rows_of(3, num_steps=12, guidance_scale=2.0)
    guided = runner.models["default"].guided_steps_of(rows[0].options)
    sizes = {False: np.array([1, 1, 1]), True: np.array([2, 2, 2])}
    for k in range(12):
        runner.step(StepRows(rows, np.full(3, k), sizes[k in guided]))
    assert equal(runner.pixels(rows).wait(), expected)
    assert 3 < len(guided) < 12


def test_step_of_the_same_rows_can_be_repeated(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine repeats a step that failed before it was enqueued."""
    runner, rows, sizes = on_graphs(loaded), rows_of(3, num_steps=6), np.array([1, 1, 1])
    expected, call = draw(new_runner(loaded), rows_of(3, num_steps=6)), GraphCalls.call
    for k in range(6):
        monkeypatch.setattr(GraphCalls, "call", out_of_memory if k == 3 else call)
        if k == 3:
            with pytest.raises(OutOfMemoryError):
                runner.step(StepRows(rows, np.full(3, k), sizes))
            monkeypatch.setattr(GraphCalls, "call", call)
        runner.step(StepRows(rows, np.full(3, k), sizes))
    assert equal(runner.pixels(rows).wait(), expected)


def test_row_whose_first_step_failed_is_black_in_a_used_slot(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, call = on_graphs(loaded, num_slots=1), GraphCalls.call
    draw(runner, rows_of(1))

    def begin_only(calls: GraphCalls, key: object, *parts: object) -> None:
        if isinstance(key, tuple):  # the graph of a step
            raise torch.OutOfMemoryError
        call(calls, key, *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(GraphCalls, "call", begin_only)
    (row,) = rows_of(1)
    with pytest.raises(OutOfMemoryError):
        runner.step(StepRows.of([row]))
    (image,) = runner.pixels([row]).wait()
    assert image is not None
    assert not image.any()


def test_warm_up_captures_the_first_graphs_and_idle_time_the_others(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded, most_rows=4)
    runner.warm_up(lambda: False)
    assert {shape for _, shape in runner._steps} == {
        Shape(rows, further, has_known=False) for rows in (1, 2, 4) for further in (0, rows)
    }
    free = len(runner._slots["default"]._free)
    while runner.has_idle_work:
        runner.idle()
    assert len(list(runner._steps)) == 2 + 3 + 4 + 5
    assert len(runner._slots["default"]._free) == free == 64


def test_warm_up_of_a_compiled_step_first_captures_the_shapes_to_compile(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded, most_rows=2)
    runner._models["default"].use(runner._models["default"].program)
    runner.warm_up(lambda: False)
    shapes = [shape for _, shape in runner._steps]
    assert shapes[:6] == shapes_to_compile()
    assert set(shapes[6:]) == {Shape(*size, has_known=False) for size in ((1, 1), (2, 0), (2, 2))}


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a warm-up quick: at most 256 noise images are drawn together, and at most 16 rows begin together."""
    monkeypatch.setattr(new_rows, "MOST_DRAWS", 256)
    monkeypatch.setattr(new_rows, "MOST_ROWS", 16)


@pytest.mark.usefixtures("few_draws")
def test_warm_up_compiles_the_step_of_every_model(loaded: Checkpoint, other: Checkpoint) -> None:
    """The models can have different architectures. test_compiler.py tests that these shapes are enough."""
    runner = GraphRunner({"default": loaded, "fast": other}, LateDevice(), torch.float32, num_slots=64, most_rows=1)
    for model in runner._models.values():
        model.use(model.program)
    runner.check = lambda: None  # type: ignore[method-assign]
    runner.warm_up(lambda: False)
    keys = list(runner._steps)
    assert keys[:12] == [(name, shape) for name in ("default", "fast") for shape in shapes_to_compile()]


@pytest.mark.usefixtures("few_draws")
def test_warm_up_captures_the_fixed_shape_of_every_model(loaded: Checkpoint, other: Checkpoint) -> None:
    runner = GraphRunner({"default": loaded, "fast": other}, LateDevice(), torch.float32, fixed_rows=4, num_slots=64)
    runner.check = lambda: None  # type: ignore[method-assign] # It would capture the shape too.
    runner.warm_up(lambda: False)
    assert list(runner._steps) == [(name, Shape(10, 16, has_known=True)) for name in ("default", "fast")]


class MeasuredDevice(LateDevice):
    """Records the memory of the tensors that each graph creates."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def capture(self, work: Callable[[], None]) -> LateGraph:
        graph = super().capture(work)
        self.sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in graph.tape.created))
        return graph


@pytest.mark.usefixtures("few_draws")
def test_warm_up_captures_large_graphs_first(loaded: Checkpoint) -> None:
    """A graph that is larger than the earlier ones does not fit into their memory."""
    device = MeasuredDevice()
    runner = GraphRunner({"default": loaded}, device, torch.bfloat16, num_slots=64, most_rows=4)
    runner.check = lambda: None  # type: ignore[method-assign]
    runner.warm_up(lambda: False)
    assert len(device.sizes) == 2 + 2 + 6
    for sizes in (device.sizes[:2], device.sizes[2:4], device.sizes[4:]):  # draws, new rows, steps
        assert max(sizes) == sizes[0] > sizes[-1]


@pytest.mark.usefixtures("few_draws")
def test_start_ends_with_one_line_if_the_step_cannot_be_compiled(loaded: Checkpoint) -> None:
    """On a GPU, torch compiles the step when a graph of it is captured."""
    runner = on_graphs(loaded, most_rows=2)

    def fail(state: State, plans: Tensor, rows: Rows) -> Stepped:
        raise CompilerError("compiling failed: ptxas was killed")

    runner._models["default"].use(fail)
    with pytest.raises(RunnerError, match=r"^UNFOG_COMPILE=on: compiling failed: ptxas was killed$"):
        runner.warm_up(lambda: False)


@GREY_AND_COLOUR
def test_previews_of_rows_without_a_step_are_black(loaded: Checkpoint) -> None:
    runner, rows = on_graphs(loaded), rows_of(2, num_steps=3)
    step(runner, rows[:1])
    expected = new_runner(loaded)
    other = rows_of(2, num_steps=3)
    step(expected, other[:1])
    pairs, of_cpu = runner.pixels_with_x_t(rows).wait(), expected.pixels_with_x_t(other).wait()
    assert all(equal(a, b) for a, b in zip(pairs, of_cpu, strict=True))
    assert equal(runner.pixels(rows).wait(), expected.pixels(other).wait())
    assert not pairs[1][0].any()


def test_probe_image_is_checked_on_graphs(loaded: Checkpoint) -> None:
    on_graphs(loaded).check()


def test_every_step_has_the_same_shape_with_fixed_rows(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded, fixed_rows=12)
    times = runner.warm_up(lambda: False)
    assert times.step_seconds(1) == times.step_seconds(24) > 0
    assert not runner.has_idle_work
    expected = draw(new_runner(copy.deepcopy(loaded)), mixed_rows())
    assert equal(draw(runner, mixed_rows(), max_batch=12, order=3), expected)
    assert equal([image for row in mixed_rows() for image in draw(runner, [row])], expected)
    assert list(runner._steps) == [("default", Shape(12, 16, has_known=True))]
    assert (runner.batches, runner.max_rows) == ((12,), 12)


@pytest.mark.parametrize("fixed_rows", [None, 4])
def test_algorithms_of_cudnn_are_deterministic_only_with_fixed_rows(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, fixed_rows: int | None
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    options, found = ({"fixed_rows": fixed_rows} if fixed_rows else {}), list[bool]()
    runner = on_graphs(loaded, **options)
    program = runner._models["default"].program
    denoise = program.denoise
    program.denoise = lambda x, c: found.append(torch.backends.cudnn.deterministic) or denoise(x, c)
    step(runner, rows_of(2))
    assert set(found) == {fixed_rows is not None}


def test_released_rows_are_freed(loaded: Checkpoint) -> None:
    runner, rows = on_graphs(loaded), rows_of(2, num_steps=1)
    step(runner, rows)
    job = weakref.ref(rows[0].job)
    runner.release(rows)
    del rows
    gc.collect()
    assert job() is None


def test_step_times_of_fixed_rows_keep_the_time_of_clip(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "warm_up", lambda runner, should_stop: StepTimes({4: 1.0, 8: 2.0}, clip_seconds=0.25))
    times = on_graphs(loaded, fixed_rows=10).warm_up(lambda: True)
    assert (times.clip_seconds, times.step_seconds(1)) == (0.25, times.step_seconds(20))


def test_step_times_of_fixed_rows_keep_those_of_each_model(
    loaded: Checkpoint, other: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = StepTimes({1: 0.1, 16: 0.2}, of_models={"fast": {1: 0.5, 16: 0.9}})
    monkeypatch.setattr(Runner, "warm_up", lambda runner, should_stop: measured)
    runner = GraphRunner({"default": loaded, "fast": other}, LateDevice(), torch.float32, fixed_rows=16, num_slots=64)
    times = runner.warm_up(lambda: True)
    assert [times.of(name).seconds(rows) for name in ("default", "fast") for rows in (1, 16)] == [0.2, 0.2, 0.9, 0.9]


def test_step_with_more_than_the_fixed_rows_is_refused(loaded: Checkpoint) -> None:
    runner = on_graphs(loaded, fixed_rows=4)
    with pytest.raises(ValueError, match="a step of 11 rows exceeds the fixed number of 10"):
        step(runner, rows_of(11))
