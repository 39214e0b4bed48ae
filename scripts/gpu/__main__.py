"""Entry point of `python -m scripts.gpu`."""

import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from scripts.gpu.arguments import as_arguments, build_parser, interpreters, outputs
from scripts.gpu.measurements.figures import Options
from scripts.gpu.report import Report
from scripts.gpu.run import ProbeError, failed_report, open_report, run_sections, to_stderr
from scripts.gpu.section import leave, run_section
from scripts.gpu.sections import SECTIONS

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # the exit statuses that shells report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sections and prints the tables. Returns the exit status."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.checkpoint and not given.checkpoint.is_file():
        parser.error(f"--checkpoint {given.checkpoint} is not a file. Name a checkpoint")
    if given.section:
        if not given.figures:
            parser.error("--section needs --figures. Use --sections to run only some sections")
        (section,) = (section for section in SECTIONS if section.name == given.section)
        options = Options(given.checkpoint, given.device, given.dtype)
        leave(run_section(section, options, given.figures))
    try:
        return _run_all(parser, given)
    except KeyboardInterrupt:  # run_process has already killed the process of the section.
        return INTERRUPTED


def _run_all(parser: ArgumentParser, given: Namespace) -> int:
    reports: list[Report] = []
    for python, out in zip(interpreters(given), outputs(given), strict=True):
        end = time.monotonic() + given.seconds
        try:
            report = open_report(python, given.device)
        except ProbeError as error:
            report = failed_report(python, error)
        try:
            report.write(out)
        except OSError as error:
            parser.error(f"cannot write {out}: {error.strerror}. Choose another file with --out")
        if not report.outcomes:
            device = report.device.split()[0]
            sections = given.sections or SECTIONS
            run_sections(report, sections, as_arguments(given, device), end - time.monotonic(), out, to_stderr)
        print(f"{report.text()}\nResults: {out}\n", flush=True)
        reports.append(report)
    print(f"Versions of torch: {', '.join(f'{report.torch} ({report.python})' for report in reports)}")
    return 1 if any(report.num_failed for report in reports) else 0


if __name__ == "__main__":
    # SystemExit makes run_process kill the process of the section.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(TERMINATED))
    sys.exit(main())
