"""Runs each section in this process with a simulated GPU."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.gpu.measurements import facts, failures, invariance, loads, machine, start, steps
from scripts.gpu.measurements.figures import Options, Sizes
from scripts.gpu.section import run_section
from scripts.gpu.sections import SECTIONS, Section
from tests.model.tiny_checkpoint import tiny_checkpoint
from tests.scripts.gpu.measurements.pretended import PretendedGpu

PROPERTIES = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), steps=(10,))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the CPU by a simulated GPU, and makes the measurements short."""
    monkeypatch.setattr(machine, "Machine", PretendedGpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    for module, values in {
        facts: {"COPY_BYTES": 1 << 20, "MATRIX": 64, "NUM_LAUNCHES": 5},
        failures: {"NUM_IMAGES": 4},
        invariance: {"SIZES": (2, 4), "FIXED_ROWS": 4, "NUM_STEPS": 2},
        loads: {"OF_GPU": Sizes(1, ((2, 2),), 0.05, 0.1, 0.01)},
        start: {"IDLE_SECONDS": 0.5},
        steps: {"SIZES": (1, 2), "NUM_CALLS": 2, "STEP_SECONDS": 0.0},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def run(section: Section, tiny: Path, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Runs a section and returns its exit status and its lines of JSON."""
    status = run_section(section, Options(tiny, "cpu", "bfloat16"), folder / "figures")
    return status, [json.loads(line) for line in (folder / "figures").read_text().splitlines()]


# The simulated GPU never runs out of memory, and its eager runner raises an IndexError.
EXPECTED_FAILURES = {
    "memory": ["eager: steps that ran out of memory"],
    "assert_eager": ["eager: error for an index that is out of range in a kernel"],
}
EXPECTED_FIGURES = {
    "engine": {
        f"{name}, {guidance}"
        for name in ("one image, engine, graph", "load, engine, 2 x 2", "device idle between steps, 2 x 2")
        for guidance in ("guidance off", "default guidance")
    },
    "steps": {"device, step, graph, 2 mixed", "sum of the kernels, eager, 1 guided"},
    "start": {"graphs captured when ready", "growth of the reserved memory in idle time"},
}
RUN = [section for section in SECTIONS if section.name not in ("http", "no_gpu", "compiled")]


@pytest.mark.parametrize("section", RUN, ids=[section.name for section in RUN])
@pytest.mark.usefixtures("pretended")
def test_section_yields_figures_on_a_gpu(section: Section, tiny: Path, tmp_path: Path) -> None:
    status, figures = run(section, tiny, tmp_path)
    assert status == 0
    assert figures and EXPECTED_FIGURES.get(section.name, set()) <= {figure["name"] for figure in figures}
    failed = [figure["name"] for figure in figures if figure.get("passed") is False]
    assert failed == EXPECTED_FAILURES.get(section.name, []), figures


@pytest.mark.usefixtures("pretended")
def test_compiled_steps_are_skipped_without_a_compiler(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CC", "missing-compiler")
    (section,) = (section for section in SECTIONS if section.name == "compiled")
    status, figures = run(section, tiny, tmp_path)
    assert status == 0
    assert figures == [
        {"skipped": "compiling for a GPU needs a C compiler. Install gcc, or set CC to another compiler"}
    ]


def test_section_without_its_package_is_skipped(tiny: Path, tmp_path: Path) -> None:
    section = Section("x", "", "app.missing", 1.0, packages=("json", "missing_one", "missing_two"))
    assert run(section, tiny, tmp_path) == (0, [{"skipped": "needs missing_one, missing_two"}])


def test_error_of_a_section_is_the_last_line_of_stderr(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, figures = run(Section("x", "", "app.missing", 1.0), tiny, tmp_path)
    assert (status, figures) == (1, [])
    assert capsys.readouterr().err.splitlines()[-1] == "ModuleNotFoundError: No module named 'app.missing'"
