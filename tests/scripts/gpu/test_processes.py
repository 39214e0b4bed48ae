"""Tests of sections that crash, hang or fail. A shell script takes the place of the Python interpreter."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu.processes import DONE, FAILED, NOT_RUN, SKIPPED, run_process
from scripts.gpu.report import Report
from scripts.gpu.run import run_sections
from scripts.gpu.sections import SECTIONS, Section

# The arguments are `-m scripts.gpu --section NAME`, further ones, and at the end the file for the figures.
INTERPRETER = """#!/bin/sh
name=$4
for file; do :; done
echo '{"name": "first", "value": 1.5, "unit": "ms"}' > "$file"
case $name in
  done) ;;
  crash) echo 'assertion failed' >&2; kill -SEGV $$ ;;
  error) printf 'Traceback\\nDeviceLostError: lost\\n' >&2; exit 1 ;;
  hang) sleep 60 & echo waiting >&2; wait ;;
  skip) echo '{"skipped": "needs fastapi"}' >> "$file" ;;
  check) echo '{"name": "second", "value": "x", "passed": false}' >> "$file" ;;
  torn) printf '{"name": "sec' >> "$file"; exit 1 ;;
esac
"""


def section(name: str, seconds: float = 30, **options: Any) -> Section:
    return Section(name, "", "", seconds, **options)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    return Report(str(interpreter), "2.13.0", "cpu (no GPU)", "2026-01-02 03:04:05")


def run(report: Report, *sections: Section, seconds: float = 60.0, out: Path) -> list[str]:
    lines: list[str] = []
    run_sections(report, sections, [], seconds, out, lines.append)
    return lines


def test_failed_section_does_not_stop_the_next_one(report: Report, tmp_path: Path) -> None:
    names = ("crash", "error", "torn", "done")
    run(report, *map(section, names), out=tmp_path / "out.json")
    assert {name: outcome.status for name, outcome in report.outcomes.items()} == {
        **dict.fromkeys(names, FAILED),
        "done": DONE,
    }
    assert report.outcomes["crash"].reason == "killed by SIGSEGV. Last line of stderr: assertion failed"
    assert report.outcomes["error"].reason == "DeviceLostError: lost"
    assert report.outcomes["error"].stderr == ["Traceback", "DeviceLostError: lost"]
    assert report.outcomes["torn"].reason == "no error message"
    first = {"name": "first", "value": 1.5, "unit": "ms"}
    assert all(outcome.figures == [first] for outcome in report.outcomes.values())
    assert report.num_failed == 3


def test_section_is_killed_with_its_children_at_its_time_limit(report: Report, tmp_path: Path) -> None:
    start = time.monotonic()
    run(report, section("hang", 1.0), section("done"), out=tmp_path / "out.json")
    assert time.monotonic() - start < 30
    assert report.outcomes["hang"].reason == "not finished after 1 s. Last line of stderr: waiting"
    assert report.outcomes["hang"].figures
    assert report.outcomes["done"].status == DONE


def test_sections_are_not_run_after_the_total_time_limit(report: Report, tmp_path: Path) -> None:
    lines = run(report, section("done"), section("skip"), seconds=0.5, out=tmp_path / "out.json")
    assert [outcome.status for outcome in report.outcomes.values()] == [NOT_RUN] * 2
    assert lines[0] == "done: not run after 0.0 s: the total time limit is reached"
    assert report.num_failed == 2


def test_results_are_written_after_each_section(report: Report, tmp_path: Path) -> None:
    out, seen = tmp_path / "out.json", list[list[str]]()
    sections = [section("check"), section("skip")]
    run_sections(
        report, sections, [], 60.0, out, lambda line: seen.append(list(json.loads(out.read_text())["sections"]))
    )
    assert seen == [["check"], ["check", "skip"]]
    content = json.loads(out.read_text())
    assert (content["torch"], content["failed"]) == ("2.13.0", 1)
    assert content["sections"]["skip"]["reason"] == "needs fastapi"
    assert content["sections"]["check"]["figures"][1] == {"name": "second", "value": "x", "passed": False}


def test_gpu_section_is_skipped_without_a_gpu(report: Report, tmp_path: Path) -> None:
    run(report, section("crash", needs_gpu=True), out=tmp_path / "out.json")
    assert (report.outcomes["crash"].status, report.outcomes["crash"].reason) == (SKIPPED, "no GPU")


def test_process_imports_the_checkout(tmp_path: Path) -> None:
    code = "import app, sys; open(sys.argv[-1], 'w').write('{\"skipped\": \"%s\"}' % app.__file__)"
    assert run_process([sys.executable, "-c", code], 60).reason == str(
        Path(__file__).parents[3] / "app" / "__init__.py"
    )


def test_names_of_sections_are_unique() -> None:
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
