"""The results of a run: the JSON file and the table."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.files import write_atomically
from scripts.gpu.processes import DONE, FAILED, SKIPPED, Outcome

WIDEST = 80  # largest width of a column in characters. A longer cell is not cut: it exceeds the column.
COLUMNS = ("section", "figure", "value", "unit", "target", "result")


@dataclass(slots=True)
class Report:
    """The results of all sections with one interpreter."""

    python: str  # the path of the interpreter
    torch: str  # the version of torch
    device: str
    started: str  # local date and time
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        """Returns the number of failed checks and sections."""
        return sum(outcome.num_failed for outcome in self.outcomes.values())

    def write(self, path: Path) -> None:
        """Writes the results so far to a JSON file. Raises OSError if this fails."""
        content = {
            "python": self.python,
            "torch": self.torch,
            "device": self.device,
            "started": self.started,
            "failed": self.num_failed,
            "sections": {name: outcome.as_json() for name, outcome in self.outcomes.items()},
        }
        write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())

    def text(self) -> str:
        """Returns the table and its summary as Markdown."""
        rows = [row for name, outcome in self.outcomes.items() for row in _rows(name, outcome)]
        widths = [min(WIDEST, max(map(len, column))) for column in zip(COLUMNS, *rows, strict=True)]
        rule = tuple("-" * width for width in widths)
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in (COLUMNS, rule, *rows)
        ]
        return "\n".join([f"torch {self.torch} on {self.device}, {self.started}", "", *lines, "", self._summary()])

    def _summary(self) -> str:
        figures = [figure for outcome in self.outcomes.values() for figure in outcome.figures]
        states = [outcome.status for outcome in self.outcomes.values()]
        passed = sum(figure.get("passed") is True for figure in figures)
        failed = sum(figure.get("passed") is False for figure in figures)
        met, missed = (sum(figure.get("met") is value for figure in figures) for value in (True, False))
        counts = ", ".join(
            f"{states.count(state)} {state}" for state in dict.fromkeys((DONE, SKIPPED, FAILED, *states))
        )
        return f"Sections: {counts}. Checks: {passed} passed, {failed} failed. Targets: {met} met, {missed} missed."


def _rows(name: str, outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table for a section."""
    for figure in outcome.figures:
        cells = (name, figure["name"], _value(figure), figure.get("unit", ""), figure.get("target", ""))
        yield *(_cell(cell) for cell in cells), _cell(_result(figure))
    if outcome.status != DONE:
        yield name, "", "", "", "", _cell(f"{outcome.status}: {outcome.reason}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _value(figure: Mapping[str, Any]) -> str:
    """Returns the text of a value. A float has at least four significant digits, or two if it is below 0.0001."""
    value = figure.get("value", "")
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def _result(figure: Mapping[str, Any]) -> str:
    """Returns the result of a check or a target, or the reason of a skip."""
    if "skipped" in figure:
        return f"skipped: {figure['skipped']}"
    if "passed" in figure:
        return "passed" if figure["passed"] else "FAILED"
    return {True: "met", False: "missed"}.get(figure["met"], "") if "met" in figure else ""
