"""Output of the scripts: a progress bar on a terminal, plain lines in a file or pipe, and one-line errors."""

import importlib
import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, ModuleType, TracebackType

LINE_EVERY_SECONDS = 30


def fail(message: str) -> "SystemExit":
    """Prints the message to stderr and returns a SystemExit with status 2 for the caller to raise."""
    print(message, file=sys.stderr)
    return SystemExit(2)


def require(module: str, extra: str = "train") -> ModuleType:
    """Imports a module of an optional extra. If it is missing, exits and prints the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _not_installed([module.partition(".")[0]], extra) from error


def require_installed(*packages: str, extra: str = "train") -> None:
    """Exits and prints the command that installs the extra, unless all packages are installed.

    Does not import them. Call this first, so that a long run does not fail at its end.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise _not_installed(missing, extra)


def _not_installed(packages: list[str], extra: str) -> SystemExit:
    are = "is" if len(packages) == 1 else "are"
    return fail(f"{', '.join(packages)} {are} not installed. Install with: pip install -e '.[{extra}]'")


class Reporter:
    """Shows the progress of long tasks: `with Reporter() as reporter, reporter.task(...) as task: ...`.

    If Ctrl-C, SIGTERM or SIGHUP stops the script, it prints `if_stopped`.
    """

    def __init__(self, if_stopped: str = "stopped") -> None:
        require("rich")
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console, self._if_stopped, self._open = Console(), if_stopped, ExitStack()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )

    def __enter__(self) -> "Reporter":
        self._open.enter_context(_report_stop(self._if_stopped))
        if self._console.is_terminal:
            self._open.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def line(self, text: str) -> None:
        """Prints a permanent line, above the progress bar if there is one."""
        if self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator["Task"]:
        """Shows a task of `total` units. Call `advance` of the yielded task to update it."""
        task = Task(self, description, total, unit)
        try:
            yield task
        finally:
            task.close()


class Task:
    """A task that a Reporter shows."""

    def __init__(self, reporter: Reporter, description: str, total: int, unit: str) -> None:
        self._reporter, self._description, self._total, self._unit = reporter, description, total, unit
        self._done, self._start = 0, time.perf_counter()
        self._last_line = self._start
        self._bar_task = reporter._bar.add_task(description, total=total, note="")

    def advance(self, amount: int, note: str = "") -> None:
        """Adds `amount` completed units and shows `note` next to the rate.

        Without a terminal, prints at most one line per LINE_EVERY_SECONDS.
        """
        self._done += amount
        now = time.perf_counter()
        rate = self._done / (now - self._start)
        note = f"{note} {rate:.0f} {self._unit}/s".strip()
        self._reporter._bar.update(self._bar_task, advance=amount, note=note)
        if not self._reporter._console.is_terminal and now - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = now
            left = (self._total - self._done) / rate
            print(f"{self._description} {self._done}/{self._total} {note}, {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Removes the progress bar."""
        self._reporter._bar.remove_task(self._bar_task)


@contextmanager
def _report_stop(message: str) -> Iterator[None]:
    """Prints `message` if Ctrl-C, SIGTERM or SIGHUP stops the block, and exits with status 130, 143 or 129.

    A signal that was ignored before, such as SIGHUP under nohup, remains ignored.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{message}", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as exit:
        if exit.code in [128 + number for number in numbers]:
            print(message, file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
