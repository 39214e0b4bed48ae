"""Reads the sections and tables of a reference document, and its code blocks with their output."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.docs.markdown import ROOT

DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n*", re.MULTILINE | re.DOTALL)

Row = dict[str, str]  # column heading -> cell


@dataclass(frozen=True)
class Example:
    """A fenced code block of a document. `output` is the block that directly follows it, if there is one."""

    document: str
    line: int
    language: str
    text: str
    output: "Example | None" = None


class Document:
    """A document in docs/."""

    def __init__(self, name: str) -> None:
        self.name, self.text = name, (DOCS / name).read_text()
        self._lines = self.text.splitlines()
        self._examples = self._read_examples()

    def section(self, heading: str) -> str:
        """Returns the text of a section with its subsections."""
        (start,) = (i for i, line in enumerate(self._lines) if line.lstrip("#") == f" {heading}")
        level, is_fenced = _level(self._lines[start]), False
        for i, line in enumerate(self._lines[start + 1 :], start + 1):
            is_fenced ^= line.startswith("```")
            if not is_fenced and 0 < _level(line) <= level:
                return "\n".join(self._lines[start:i])
        return "\n".join(self._lines[start:])

    def table(self, heading: str, *columns: str) -> list[Row]:
        """Returns the rows of the first table with these columns in a section."""
        return next(table for table in tables_in(self.section(heading)) if set(columns) <= set(table[0]))

    def examples(self, language: str) -> list[Example]:
        """Returns all code blocks in this language."""
        return [example for example in self._examples if example.language == language]

    def _read_examples(self) -> list[Example]:
        found: list[Example] = []
        for match in reversed(list(_FENCE.finditer(self.text))):
            line = self.text.count("\n", 0, match.start()) + 1
            has_output = self.text.startswith("```", match.end())
            found.insert(0, Example(self.name, line, match[1], match[2], found[0] if has_output else None))
        return found


def run_bash(script: str, folder: Path, **variables: str) -> str:
    """Runs the commands of an example in a folder. Returns what they print."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tables_in(text: str) -> list[list[Row]]:
    """Returns all tables in a text."""
    tables = []
    for match in re.finditer(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        heading, _, *rows = (_cells(line) for line in match[0].splitlines())
        tables.append([dict(zip(heading, row, strict=True)) for row in rows])
    return tables


def codes(cell: str) -> list[str]:
    """Returns the texts between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def _level(line: str) -> int:
    """Returns the level of a heading; 0 for any other line."""
    hashes = re.match(r"#+(?= )", line)
    return len(hashes[0]) if hashes else 0
