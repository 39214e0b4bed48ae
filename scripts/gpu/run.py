"""Runs the sections one after the other with an interpreter."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from scripts.gpu.measurements.figures import NO_GPU
from scripts.gpu.processes import FAILED, NOT_RUN, SKIPPED, Outcome, environment, run_process
from scripts.gpu.report import Report
from scripts.gpu.sections import Section

LEAST_SECONDS = 5.0  # a section is not started if less time is left
PROBE_SECONDS = 90.0
PROBE = """
import json, sys, torch
from app.runner.device import choose_device
device = choose_device(sys.argv[1])
name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
print(json.dumps({"torch": torch.__version__, "device": str(device), "name": name}))
"""

Say = Callable[[str], None]  # prints a line about the progress


class ProbeError(Exception):
    """An interpreter cannot run the sections. The message is one line."""


def open_report(python: str, device: str) -> Report:
    """Returns an empty report with the version of torch and the device. Raises ProbeError if they cannot be found."""
    command = [python, "-c", PROBE, device]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False, timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProbeError(f"{python} cannot be used: {error}. Name another interpreter with --python") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise ProbeError(f"{python} cannot run the sections: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    text = f"{found['device']} ({found['name']})"
    return Report(python, found["torch"], text, time.strftime("%Y-%m-%d %H:%M:%S"))


def run_sections(
    report: Report, sections: Sequence[Section], arguments: Sequence[str], seconds: float, out: Path, say: Say
) -> None:
    """Runs the sections and adds their results to the report. Tries to write the report to a file after each section.

    `seconds` limits all sections together. When no time is left, the remaining sections are not run.
    """
    end, is_gpu = time.monotonic() + seconds, report.device.startswith("cuda")
    for section in sections:
        left = end - time.monotonic()
        if section.needs_gpu and not is_gpu:
            outcome = Outcome(SKIPPED, NO_GPU)
        elif left < LEAST_SECONDS:
            outcome = Outcome(NOT_RUN, "the total time limit is reached")
        else:
            command = [report.python, "-m", "scripts.gpu", "--section", section.name, *arguments, "--figures"]
            outcome = run_process(command, min(section.seconds, left))
        report.outcomes[section.name] = outcome
        with suppress(OSError):  # If writing fails, the other sections still run.
            report.write(out)
        reason = f": {outcome.reason}" if outcome.reason else ""
        say(f"{section.name}: {outcome.status} after {outcome.seconds:.1f} s{reason}")


def failed_report(python: str, error: ProbeError) -> Report:
    """Returns the report of an interpreter that cannot run the sections."""
    report = Report(python, "unknown", "unknown device", time.strftime("%Y-%m-%d %H:%M:%S"))
    report.outcomes["probe"] = Outcome(FAILED, str(error))
    return report


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
