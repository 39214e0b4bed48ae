"""Starts the process of a section, ends it at its time limit, and reads its figures and its error."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # the folder of the packages
KILL_SECONDS = 5.0  # time for a killed process to end. A process that waits in the driver can take longer.
LINES_KEPT = 20  # the number of last lines of stderr that a failed section has in the results
DONE, SKIPPED, FAILED, NOT_RUN = "done", "skipped", "failed", "not run"


@dataclass(slots=True)
class Outcome:
    """The result of a section."""

    status: str  # DONE, SKIPPED, FAILED or NOT_RUN
    reason: str = ""  # why the status is not DONE
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)  # the last lines, after a failure

    @property
    def num_failed(self) -> int:
        """Returns the number of failed checks. A section that failed or that was not run counts as one more."""
        return (self.status in (FAILED, NOT_RUN)) + sum(figure.get("passed") is False for figure in self.figures)

    def as_json(self) -> dict[str, Any]:
        """Returns the result without its empty fields."""
        content = asdict(self) | {"seconds": round(self.seconds, 2)}
        return {name: value for name, value in content.items() if value or name in ("status", "seconds")}


def environment() -> dict[str, str]:
    """Returns environment variables for the process of a section, which can then import this checkout."""
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


def run_process(command: Sequence[str], seconds: float) -> Outcome:
    """Runs the process of a section. The path of the file for its figures is added as the last argument.

    After `seconds`, the process and all its children are killed. The figures that it has written are kept.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unfog-") as folder:
        figures, errors = Path(folder, "figures"), Path(folder, "stderr")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*command, str(figures)],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill(process)
        outcome = _read(figures)
        lines = errors.read_text(errors="replace").strip().splitlines()
    outcome.seconds = time.monotonic() - start
    if status != 0:
        outcome.status, outcome.reason = FAILED, _reason(status, seconds, lines)
        outcome.stderr = lines[-LINES_KEPT:]
    return outcome


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and those of its children that still run."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


def _read(path: Path) -> Outcome:
    """Returns the figures of a section. An incomplete last line is ignored."""
    outcome = Outcome(DONE)
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            content = json.loads(line)
            if "name" in content:
                outcome.figures.append(content)
            else:
                outcome.status, outcome.reason = SKIPPED, content["skipped"]
    return outcome


def _reason(status: int | None, seconds: float, lines: Sequence[str]) -> str:
    last = lines[-1] if lines else "no error message"
    if status is None:
        return f"not finished after {seconds:.0f} s. Last line of stderr: {last}"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}. Last line of stderr: {last}"
    return last
