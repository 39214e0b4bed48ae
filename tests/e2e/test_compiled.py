"""The compiled step in a running service: loaded from the cache without a compiler, same bytes under any load."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from model.checkpoint import load
from model.compiled.compiler import compiled_step, library_of
from model.precision import can_compile, fast_dtype
from model.step import ReverseStep
from tests.e2e.conftest import Start, start_service
from tests.e2e.process import BASE, TIMEOUT
from tests.e2e.service import Service
from tests.e2e.test_reproducibility import ENOUGH_ROWS, generate_alone, generate_batched
from tests.model.compiled.libraries import CRASHES, library_content

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def variables(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns variables for a service that loads the compiled step from the cache and has no compiler."""
    cache = tmp_path_factory.mktemp("cache")
    device = torch.device("cpu")
    compiled_step(ReverseStep(load(checkpoint), device, fast_dtype(device)), cache)
    return {"UNFOG_COMPILE": "auto", "UNFOG_CACHE_DIR": str(cache), "CXX": "no-such-compiler"}


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, variables: dict[str, str]) -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300", **variables)


@pytest.fixture(scope="module")
def alone(compiled: Service) -> dict[str, list[bytes]]:
    return generate_alone(compiled)


def test_health_reports_compiled(compiled: Service) -> None:
    assert compiled.client.get("/health").json()["compiled"] is True


def test_compiled_bytes_are_the_same_in_a_batch_with_hundreds_of_images(
    compiled: Service, alone: dict[str, list[bytes]]
) -> None:
    batched, num_others, mean_rows = generate_batched(compiled, num_others=320, steps=(15, 35))
    assert num_others >= 300
    assert mean_rows >= ENOUGH_ROWS
    assert batched == alone


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_bytes_do_not_depend_on_threads_batch_size_or_restart(
    alone: dict[str, list[bytes]], start: Start, variables: dict[str, str], threads: int
) -> None:
    own = {"UNFOG_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "UNFOG_MAX_BATCH": "7"}
    again = start(**variables, **own)
    assert generate_batched(again, num_others=20, steps=(1, 10))[0] == alone


def test_without_a_compiler_the_service_runs_uncompiled_and_logs_it(start: Start, tmp_path: Path) -> None:
    uncompiled = start(UNFOG_COMPILE="auto", UNFOG_CACHE_DIR=str(tmp_path), CXX="no-such-compiler")
    assert uncompiled.client.get("/health").json()["compiled"] is False
    assert any("Model not compiled, steps take longer" in line for line in uncompiled.process.lines)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def crashing_cache(checkpoint: Path, tmp_path: Path) -> str:
    """Returns a cache folder with a compiled step that crashes the process."""
    program = ReverseStep(load(checkpoint), torch.device("cpu"), fast_dtype(torch.device("cpu")))
    (tmp_path / "cache").mkdir()
    library_of(program, tmp_path / "cache").write_bytes(library_content(CRASHES, tmp_path))
    return str(tmp_path / "cache")


def test_service_runs_uncompiled_if_the_compiled_step_crashes(start: Start, crashing_cache: str) -> None:
    uncompiled = start(UNFOG_COMPILE="auto", UNFOG_CACHE_DIR=crashing_cache, CXX="no-such-compiler")
    assert uncompiled.client.get("/health").json()["compiled"] is False
    assert uncompiled.images(digit=3, seed=1, num_steps=5)
    assert any("ended by SIGSEGV" in line for line in uncompiled.process.lines)


def test_compile_only_reports_a_compiled_step_that_crashes(checkpoint: Path, crashing_cache: str) -> None:
    done = compile_only(checkpoint, UNFOG_CACHE_DIR=crashing_cache, CXX="no-such-compiler")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("unfog: UNFOG_COMPILE=on: ")
    assert "ended by SIGSEGV" in done.stderr.splitlines()[-1]


def compile_only(checkpoint: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs `python -m app --compile`."""
    own = {**BASE, "UNFOG_CHECKPOINT": str(checkpoint), **variables}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UNFOG_")}
    command = [sys.executable, "-m", "app", "--compile"]
    return subprocess.run(command, env=clean | own, capture_output=True, text=True, timeout=TIMEOUT)


def test_compile_only_succeeds_if_the_step_is_cached(checkpoint: Path, variables: dict[str, str]) -> None:
    assert compile_only(checkpoint, **variables).returncode == 0  # CXX does not name a compiler


def test_compile_only_without_a_compiler_is_a_one_line_error(checkpoint: Path, tmp_path: Path) -> None:
    done = compile_only(checkpoint, UNFOG_CACHE_DIR=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("unfog: UNFOG_COMPILE=on: compiling needs a C++ compiler")
