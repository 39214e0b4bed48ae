"""Compares the compiled step with itself in other batches, and with the step without compilation."""

import ctypes
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import InternalTorchDynamoError

from app.engine.job import StepRows, Trajectory
from app.runner.device import RunnerError
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.graphs.shapes import Shape, shapes_to_compile
from app.runner.runner import Runner
from model import checkpoint
from model.checkpoint import Checkpoint
from model.compiled import compiler
from model.compiled.compiler import CompilerError, FlatStep, library_of
from model.compiled.compiler import build as build_unshared  # before the fixture shared_builds replaces it
from model.precision import can_compile
from model.step import ReverseStep, Rows, State, Step, Stepped
from scripts.benchmark.sleeping_runner import EagerDevice
from tests.app.runner.rows import draw, equal, mixed_rows
from tests.app.runner.task_rows import drawings, finish, task_rows
from tests.model.compiled.log_fields import logged_field
from tests.model.tiny_checkpoint import tiny_checkpoint
from tests.tiny import COMPILED

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def loaded(path: Path) -> Checkpoint:
    return checkpoint.load(path)


def compiled_runner(loaded: Checkpoint, cache: Path, dtype: torch.dtype = torch.bfloat16) -> Runner:
    runner = Runner({"default": loaded}, CPU, dtype)
    runner.compile(cache, must=True)
    return runner


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_row_has_the_same_pixels_in_any_batch(loaded: Checkpoint, cache: Path, dtype: str) -> None:
    runner = compiled_runner(loaded, cache, DTYPES[dtype])
    assert runner.models["default"].compiled
    alone = [draw(runner, [row])[0] for row in mixed_rows()]
    assert len({image.tobytes() for image in alone}) == len(alone)
    for max_batch, order in [(64, None), (64, 1), (7, 3), (2, 5), (1, 6)]:
        assert equal(draw(runner, mixed_rows(), max_batch, order), alone)


@needs_compiler
def test_compiled_row_of_any_task_has_the_same_pixels_and_errors_in_any_batch(loaded: Checkpoint, cache: Path) -> None:
    runner = compiled_runner(loaded, cache)
    info = runner.models["default"]
    alone = [finish(runner, [row])[0] for row in task_rows(info)]
    expected = [*alone, *finish(runner, drawings(info))]
    for max_batch, order in [(64, 1), (7, 3)]:
        assert finish(runner, [*task_rows(info), *drawings(info)], max_batch, order) == expected


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_step_equals_plain_step_except_for_rounding(path: Path, cache: Path, dtype: str) -> None:
    plain = draw(Runner({"default": checkpoint.load(path)}, CPU, DTYPES[dtype]), mixed_rows())
    compiled = draw(compiled_runner(checkpoint.load(path), cache, DTYPES[dtype]), mixed_rows())
    difference = np.abs(np.stack(plain).astype(float) - np.stack(compiled)).mean()
    assert difference < (8 if dtype == "bfloat16" else 0.01)  # in grey levels from 0 to 255


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_the_compiled_step_equal_those_of_the_plain_step_except_for_rounding(
    path: Path, cache: Path, dtype: str
) -> None:
    """Compares the first step, because later steps evaluate the classes that are left."""
    of_plain, of_compiled = (
        first_errors(runner)
        for runner in (
            Runner({"default": checkpoint.load(path)}, CPU, DTYPES[dtype]),
            compiled_runner(checkpoint.load(path), cache, DTYPES[dtype]),
        )
    )
    assert len(of_plain) == 10 * 4  # ten classes in two searches and two recognitions
    assert min(of_plain) > 0
    np.testing.assert_allclose(of_compiled, of_plain, rtol=0.05 if dtype == "bfloat16" else 1e-3)


def first_errors(runner: Runner) -> list[float]:
    """Returns the errors of the first step of all rows that compare the classes."""
    rows = [row for row in task_rows(runner.models["default"]) if row.comparison]
    assert not runner.step(StepRows.of(rows))
    return [error for errors in runner.errors(rows).wait() for error in errors]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoints_share_a_library_and_keep_their_own_images(
    path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    compiled_runner(checkpoint.load(path), cache, DTYPES[dtype])
    monkeypatch.setattr(compiler, "build", lambda program: pytest.fail("compiled again"))
    other = tiny_checkpoint(tmp_path, seed=1, **COMPILED)
    plain = draw(Runner({"default": checkpoint.load(other)}, CPU, DTYPES[dtype]), mixed_rows())
    compiled = draw(compiled_runner(checkpoint.load(other), cache, DTYPES[dtype]), mixed_rows())
    assert np.abs(np.stack(plain).astype(float) - np.stack(compiled)).mean() < (8 if dtype == "bfloat16" else 0.01)
    first = draw(compiled_runner(checkpoint.load(path), cache, DTYPES[dtype]), mixed_rows())
    assert np.abs(np.stack(first).astype(float) - np.stack(compiled)).mean() > 20


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_do_not_depend_on_the_number_of_threads(path: Path, cache: Path, dtype: str) -> None:
    before, images = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            images.append(draw(compiled_runner(checkpoint.load(path), cache, DTYPES[dtype]), mixed_rows()))
    finally:
        torch.set_num_threads(before)
    assert equal(images[0], images[1])
    assert equal(images[0], images[2])


@needs_compiler
def test_changing_the_number_of_threads_between_steps_keeps_the_pixels(
    loaded: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, before = compiled_runner(loaded, cache), torch.get_num_threads()
    expected, step, counts = draw(runner, mixed_rows()), runner.step, itertools.cycle((1, 3, 2))

    def step_with_other_threads(trajectories: list[Trajectory]) -> list[bool]:
        torch.set_num_threads(next(counts))
        return step(trajectories)

    monkeypatch.setattr(runner, "step", step_with_other_threads)
    try:
        assert equal(draw(runner, mixed_rows()), expected)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_non_contiguous_inputs_are_rejected(loaded: Checkpoint, cache: Path) -> None:
    program = ReverseStep(loaded, CPU, torch.bfloat16)
    if program.call_rows.most:
        pytest.skip("with a fixed number of rows only the network is compiled, and its inputs are always contiguous")
    step, every = compiler.compiled_step(program, cache), torch.arange(2)
    state = State.zeros(4, loaded.image_shape, CPU)
    plans, rows = (
        torch.tensor([[50.0, 0.9, 0.1, 0.0, 0.1, 1.0, 0.0]]),
        Rows(every, torch.zeros_like(every), every, torch.zeros_like(every), every),
    )
    assert len(step(state, plans, rows)) == len(Stepped._fields)
    state.x_t = state.x_t.transpose(2, 3)
    with pytest.raises(RuntimeError, match="contiguous"):
        step(state, plans, rows)


@needs_compiler
def test_compiled_step_is_loaded_from_the_cache(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(compiled_runner(checkpoint.load(path), cache), mixed_rows())
    monkeypatch.setattr(compiler, "build", lambda program: pytest.fail("compiled again"))
    monkeypatch.setattr(compiler, "can_compile", lambda: False)
    assert equal(draw(compiled_runner(checkpoint.load(path), cache), mixed_rows()), first)


@needs_compiler
def test_library_contains_no_weights(loaded: Checkpoint, cache: Path) -> None:
    """If the library contained weights, each program would copy them, and checkpoints could not share the library."""
    program = compiled_runner(loaded, cache)._models["default"].program
    content = library_of(program, cache).read_bytes()
    for tensor in program.state_dict().values():
        assert tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()[:64] not in content


@needs_compiler
@pytest.mark.parametrize("damage", ["changed byte", "missing end", "other content"])
def test_damaged_library_is_recompiled(
    loaded: Checkpoint,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    program = ReverseStep(loaded, CPU, torch.bfloat16)
    compiler.compiled_step(program, cache)
    content = bytearray(library_of(program, cache).read_bytes())
    content[len(content) // 2] ^= 1
    library = library_of(program, tmp_path)
    library.write_bytes({"changed byte": content, "missing end": content[:-100], "other content": b"other"}[damage])
    intact = library_of(program, cache).read_bytes()
    monkeypatch.setattr(compiler, "build", lambda program: intact)
    compiler.compiled_step(program, tmp_path)
    assert library.read_bytes() == intact
    assert "Discarding compiled step, recompiling" in caplog.text


@needs_compiler
@pytest.mark.parametrize("fault", ["not writable", "noexec"])
def test_unusable_cache_is_logged_and_the_step_is_compiled(
    path: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    first = draw(compiled_runner(checkpoint.load(path), cache), mixed_rows())
    library = library_of(ReverseStep(checkpoint.load(path), CPU, torch.bfloat16), cache)
    monkeypatch.setattr(compiler, "build", lambda program: library.read_bytes())
    if fault == "not writable":
        (tmp_path / "unusable").touch()
    load_library = ctypes.CDLL

    def load_outside_the_cache(name: str) -> ctypes.CDLL:
        if os.path.realpath(name).startswith(str(tmp_path / "unusable")):
            raise OSError("failed to map segment from shared object")
        return load_library(name)

    monkeypatch.setattr(ctypes, "CDLL", load_outside_the_cache)
    assert equal(draw(compiled_runner(checkpoint.load(path), tmp_path / "unusable"), mixed_rows()), first)
    assert "each start recompiles" in caplog.text


def test_missing_compiler_is_logged_and_the_plain_step_is_used(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "can_compile", lambda: False)
    plain = draw(Runner({"default": checkpoint.load(path)}, CPU, torch.bfloat16), mixed_rows())
    runner = Runner({"default": checkpoint.load(path)}, CPU, torch.bfloat16)
    with pytest.raises(RunnerError, match=r"UNFOG_COMPILE=on: compiling needs a C\+\+ compiler"):
        runner.compile(tmp_path, must=True)
    with caplog.at_level(logging.WARNING):
        runner.compile(tmp_path, must=False)
    assert "compiling needs a C++ compiler" in logged_field(caplog, "Model not compiled, steps take longer")
    assert not runner.models["default"].compiled
    assert equal(draw(runner, mixed_rows()), plain)


def test_compilation_is_announced_with_its_usual_duration(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_at_once(*arguments: Any, **options: Any) -> None:
        assert logged_field(caplog, "Compiling step", "expected_seconds") == "30-60"
        *_, library = arguments
        library.write_bytes(b"code")

    monkeypatch.setattr(compiler, "call_in_child", compile_at_once)
    with caplog.at_level(logging.INFO):
        build_unshared(ReverseStep(loaded, CPU, torch.bfloat16))
    assert int(logged_field(caplog, "Compiled step", "seconds")) >= 0


def test_unreadable_cache_is_treated_as_empty(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_ = os.open

    def open_outside_the_cache(file: Path, *arguments: Any, **options: Any) -> int:
        if Path(file).is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied", str(file))
        return open_(file, *arguments, **options)

    runner = Runner({"default": checkpoint.load(path)}, CPU, torch.bfloat16)
    monkeypatch.setattr(os, "open", open_outside_the_cache)
    monkeypatch.setattr(compiler, "can_compile", lambda: False)
    assert not runner.compile(tmp_path, must=False)
    assert "Permission denied" in logged_field(caplog, "Model not compiled")


def test_compiler_failure_is_one_line(loaded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: ReverseStep) -> bytes:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(compiler, "build", fail)
    monkeypatch.setattr(compiler, "can_compile", lambda: True)
    with pytest.raises(CompilerError, match=r"^compiling failed: first line$"):
        compiler.compiled_step(ReverseStep(loaded, CPU, torch.bfloat16), tmp_path)


def test_gpu_compiler_failure_at_warm_up_is_one_line(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(program: FlatStep, **options: object) -> Callable[..., Stepped]:
        def step(*inputs: Tensor) -> Stepped:
            raise InternalTorchDynamoError("no C compiler\nsecond line")

        return step

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compiler, "use_private_compile_cache", lambda cache: cache)
    runner = Runner({"default": checkpoint.load(path)}, CPU, torch.bfloat16)
    (network,) = runner._models.values()
    network.program.device = torch.device("cuda")
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        assert runner.compile(tmp_path, must=True)
        with pytest.raises(RunnerError, match=r"^UNFOG_COMPILE=on: compiling failed: no C compiler$"):
            runner.warm_up(lambda: False)


def test_gpu_step_is_compiled_for_all_batch_sizes_in_a_private_folder(
    loaded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def compile_(forward: Step, **options: object) -> Step:
        calls.append(options)
        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compiler, "use_private_compile_cache", calls.append)
    program = ReverseStep(loaded, CPU, torch.bfloat16)
    program.device = torch.device("cuda")
    dynamo, inductor = torch._dynamo.config, torch._inductor.config
    with dynamo.patch(recompile_limit=8, fail_on_recompile_limit_hit=False), inductor.patch(compile_threads=32):
        assert compiler.compiled_step(program, tmp_path)
        assert dynamo.fail_on_recompile_limit_hit
        assert inductor.compile_threads == 4
    assert calls == [tmp_path / "gpu", {"dynamic": True}]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # it compiles for half a minute
def test_gpu_step_is_compiled_for_no_other_shape_after_the_shapes_to_compile(tmp_path: Path) -> None:
    file = tiny_checkpoint(tmp_path)
    graphs: list[torch.fx.GraphModule] = []

    def record_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    runner, expected = (
        # In float32, the algorithm of a convolution on a CPU depends on the number of rows.
        GraphRunner({"default": checkpoint.load(file)}, EagerDevice(), torch.bfloat16, num_slots=64, most_rows=8)
        for _ in range(2)
    )
    compiled = runner._models["default"]
    compiled.step = torch.compile(compiled.program.forward, backend=record_graph, dynamic=True)
    try:
        with torch.inference_mode():
            for shape in shapes_to_compile():
                runner._run_step(compiled, shape)
            assert len(graphs) == 6
            for rows, further in itertools.product((1, 8, 32), (0, 1, 9)):
                for has_known in (False, True):
                    runner._run_step(compiled, Shape(rows, further, has_known))
        for max_batch in (5, 64):
            assert equal(draw(runner, mixed_rows(), max_batch), draw(expected, mixed_rows(), max_batch))
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 6


@pytest.fixture
def names(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yields the file names of libraries with different properties."""

    def name(loaded: Checkpoint, dtype: torch.dtype = torch.float32) -> str:
        return library_of(ReverseStep(loaded, CPU, dtype), tmp_path).name

    (tmp_path / "other").mkdir()
    other = checkpoint.load(tiny_checkpoint(tmp_path / "other", num_pairs=2, **COMPILED))
    found = [name(checkpoint.load(path)), name(checkpoint.load(path), torch.bfloat16), name(other)]
    monkeypatch.setattr(compiler, "_processor_features", lambda: "flags: fewer")
    found.append(name(checkpoint.load(path)))
    monkeypatch.setattr(torch, "__version__", "1.0")
    yield [*found, name(checkpoint.load(path))]


def test_library_name_depends_on_architecture_dtype_processor_and_torch(names: list[str]) -> None:
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_exported_step_uses_the_faster_formulas(loaded: Checkpoint, dtype: torch.dtype) -> None:
    program = ReverseStep(loaded, CPU, dtype)
    with torch.no_grad():
        exported = compiler._export_denoise(program) if program.call_rows.most else compiler._export_step(program)
    called = " ".join(str(node.target) for node in exported.graph.nodes)
    assert "sigmoid" in called
    assert "rsqrt" in called
    assert not re.search("group_norm|gelu", called)
