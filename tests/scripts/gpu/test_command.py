"""Runs `python -m scripts.gpu` on a CPU with a tiny network, without the packages for HTTP."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import __main__ as command_module
from scripts.gpu import service
from scripts.gpu.__main__ import main
from scripts.gpu.arguments import build_parser
from scripts.gpu.measurements.figures import Options, Sizes
from scripts.gpu.report import Report
from scripts.gpu.sections import HTTP_PACKAGES, SECTIONS
from tests.docs.markdown import commands
from tests.model.tiny_checkpoint import tiny_checkpoint

ROOT = Path(__file__).parents[3]
PREFIXES = ("python -m scripts.gpu", "scripts/gpu_check")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), steps=(10,))


def gpu_check(folder: Path, *arguments: str, blocked: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    """Runs the command in a folder. The blocked packages cannot be imported."""
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(code)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.gpu", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=280)


@pytest.mark.slow  # it runs all sections
def test_every_section_runs_or_is_skipped_on_a_cpu_without_the_packages_for_http(tiny: Path, tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "--checkpoint", str(tiny), blocked=(*HTTP_PACKAGES, "starlette", "pydantic"))
    content: dict[str, Any] = json.loads((tmp_path / "gpu_check.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    sections = content["sections"]
    skipped = {name: section["reason"] for name, section in sections.items() if section["status"] == "skipped"}
    assert skipped == {
        **{section.name: "no GPU" for section in SECTIONS if section.needs_gpu},
        "http": f"needs {', '.join(HTTP_PACKAGES)}",
    }
    assert {section["status"] for name, section in sections.items() if name not in skipped} == {"done"}
    assert list(sections) == [section.name for section in SECTIONS]
    figures = {figure["name"]: figure for section in sections.values() for figure in section.get("figures", ())}
    assert figures["torch"]["value"] == content["torch"]
    assert figures["probe images, eager: default"]["passed"]
    assert figures["device of UNFOG_DEVICE=auto"]["passed"]
    assert figures["probe images, graph"]["skipped"] == "no GPU"
    assert "| no_gpu " in done.stdout
    assert f"Versions of torch: {content['torch']}" in done.stdout
    assert "facts: done after " in done.stderr


def test_section_over_http_measures_the_real_service(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(service, "OF_CPU", Sizes(1, ((1, 2),), 0.0, 1.0, 0.1))
    figures = {figure.name: figure for figure in service.measure(Options(tiny, "cpu"))}
    assert all(figure.value for figure in figures.values())
    assert all(figure.target is None for figure in figures.values())
    assert {"process start to ready, HTTP", "one image, HTTP, default guidance"} < set(figures)


def test_unknown_section_is_refused_with_the_names_of_all_sections(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--sections", "facts,speed"])
    assert exit_.value.code == 2
    assert "unknown section 'speed'. The sections are facts, correctness, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "missing.safetensors"], "--checkpoint missing.safetensors is not a file"),
        (["--seconds", "601"], "must be a number above 0 and at most 600"),
        (["--sections", ","], "name at least one section"),
        (["--device", "gpu"], "must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:x"], "must be auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        (["--out", "missing/gpu_check.json"], "there is no folder missing"),
    ],
)
def test_invalid_argument_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_interpreter_without_torch_fails_and_the_next_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    out = tmp_path / "result.json"
    arguments = ["--python", str(broken), "--python", sys.executable, "--sections", "memory", "--out", str(out)]
    assert main([*arguments, "--device", "cpu"]) == 1
    first, second = (json.loads((tmp_path / f"result-{n}.json").read_text()) for n in (1, 2))
    assert first["sections"]["probe"]["reason"].endswith("No module named 'torch'")
    assert second["sections"] == {"memory": {"status": "skipped", "reason": "no GPU", "seconds": 0.0}}
    assert f"Versions of torch: unknown ({broken}), {second['torch']} ({sys.executable})" in capsys.readouterr().out


def test_results_that_cannot_be_written_are_reported_before_the_sections_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_module, "open_report", lambda python, device: Report(python, "2.13.0", device, ""))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--device", "cpu"])
    assert "Choose another file with --out" in capsys.readouterr().err


def test_help_of_the_wrapper_is_printed_without_installing_anything() -> None:
    done = subprocess.run([str(ROOT / "scripts" / "gpu_check"), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: scripts/gpu_check [ARGUMENTS]\n")
    assert done.stderr == ""


def test_help_lists_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert [section.name for section in SECTIONS if f"  {section.name} " not in text] == []


def test_documented_commands_are_accepted() -> None:
    words = [
        command[command.index(prefix) + len(prefix) :].split()
        for command in commands(ROOT / "docs" / "gpu.md")
        for prefix in PREFIXES
        if prefix in command
    ]
    assert len(words) >= 3
    for arguments in words:
        build_parser().parse_args(arguments)
