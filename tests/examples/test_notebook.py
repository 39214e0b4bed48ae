"""The notebook in examples/: its code runs, and the stored output belongs to it."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.examples.programs import EXAMPLES

NOTEBOOK = EXAMPLES / "noise_to_seven.ipynb"
BOOK: dict[str, Any] = json.loads(NOTEBOOK.read_text())
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
CHECK = """
from scripts.evaluation.classifiers import load_classifier, recognise

print("share of sevens:", (recognise(load_classifier("judge").network, to_pixels(x_0)) == 7).float().mean().item())
"""
ROUNDING = re.compile(r"largest difference of the two loops: (\S+)")


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_notebook_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 300_000


def test_code_cells_are_valid_and_ran_in_order_without_errors() -> None:
    for number, cell in enumerate(CODE, 1):
        ast.parse(source(cell))
        assert cell["execution_count"] == number
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "display_data"}


def test_cells_that_show_or_print_have_stored_output() -> None:
    for cell in CODE:
        calls = re.findall(r"^(show|print|plt\.show)\(", source(cell), re.MULTILINE)
        pictures = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert pictures == len([name for name in calls if name != "print"])
        assert len(printed(cell).splitlines()) == calls.count("print")


@pytest.mark.slow
def test_code_cells_run_and_print_the_stored_output(tmp_path: Path) -> None:
    """Takes half a minute. Also checks that the last grid consists of sevens."""
    program = "\n".join([*map(source, CODE), CHECK])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    *lines, sevens = done.stdout.splitlines()
    found = ROUNDING.search(done.stdout)
    assert found
    assert float(found[1]) < 1e-3
    stored = "".join(map(printed, CODE)).splitlines()
    assert [line for line in lines if not ROUNDING.match(line)] == [line for line in stored if not ROUNDING.match(line)]
    assert float(sevens.removeprefix("share of sevens: ")) >= 0.9
