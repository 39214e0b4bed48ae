"""Tests of the table."""

from scripts.gpu.measurements.figures import Figure, Target
from scripts.gpu.processes import DONE, FAILED, Outcome
from scripts.gpu.report import Report


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


def table(*figures: Figure, status: str = DONE, reason: str = "") -> list[str]:
    outcome = Outcome(status, reason, figures=[figure.as_json() for figure in figures])
    return Report("python", "2.13.0", "cuda (H100)", "2026-01-02 03:04:05", {"load": outcome}).text().splitlines()


def test_table_has_targets_checks_and_skips() -> None:
    lines = table(
        Figure("rate", 5123.4, "images/s", Target(5000, is_at_most=False)),
        Figure("idle", 12.0, "%", Target(10)),
        Figure("right", "ok", passed=True),
        Figure("wrong", 3, passed=False),
        Figure("GPU", skipped="no GPU"),
        Figure("a|b", 0.00123, "ms"),
    )
    assert lines[0] == "torch 2.13.0 on cuda (H100), 2026-01-02 03:04:05"
    assert [cells(line)[1:] for line in lines[4:10]] == [
        ["rate", "5,123", "images/s", "at least 5000", "met"],
        ["idle", "12.00", "%", "at most 10", "missed"],
        ["right", "ok", "", "", "passed"],
        ["wrong", "3", "", "", "FAILED"],
        ["GPU", "", "", "", "skipped: no GPU"],
        ["a/b", "0.001230", "ms", "", ""],
    ]
    assert len({len(line) for line in lines[2:10]}) == 1
    assert lines[-1] == "Sections: 1 done, 0 skipped, 0 failed. Checks: 1 passed, 1 failed. Targets: 1 met, 1 missed."


def test_failed_section_has_a_row_with_its_error() -> None:
    lines = table(Figure("one", 1), status=FAILED, reason="killed by SIGKILL")
    assert [cells(line) for line in lines[4:6]] == [
        ["load", "one", "1", "", "", ""],
        ["load", "", "", "", "", "failed: killed by SIGKILL"],
    ]
