"""Runs one section in this process. Writes each figure to a file immediately, so that a crash does not lose it."""

import json
import os
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.gpu.measurements.figures import Options, Skipped, error_line
from scripts.gpu.sections import Section


def run_section(section: Section, options: Options, path: Path) -> int:
    """Runs a section and appends one line of JSON for each figure to a file. Returns the exit status.

    An error is written to stderr. Its last line is the type and the message of the error.
    """
    with path.open("a") as file:

        def write(content: dict[str, Any]) -> None:
            file.write(f"{json.dumps(content)}\n")
            file.flush()

        try:
            missing = [package for package in section.packages if find_spec(package) is None]
            if missing:
                raise Skipped(f"needs {', '.join(missing)}")
            for figure in getattr(import_module(section.module), section.function)(options):
                write(figure.as_json())
        except Skipped as reason:
            write({"skipped": str(reason)})
        except Exception as error:
            traceback.print_exc()
            print(error_line(error), file=sys.stderr)
            return 1
    return 0


def leave(status: int) -> None:
    """Ends the process without running the destructors of CUDA. They abort the process after an error in a kernel."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
