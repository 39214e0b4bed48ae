"""Output of the scripts: a progress bar on a terminal, plain lines in a file or pipe, and one-line errors."""

import importlib
import importlib.util
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from scripts.common.stopping import Say, stops

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY_SECONDS = 30
Stop = Callable[[Say], AbstractContextManager[object]]  # `stops` or `stops_soon`


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

    Does not import them. Call this after all arguments are checked and before the work starts, so that a long run does
    not fail at its end.
    """
    if missing := [package for package in packages if not is_installed(package)]:
        raise _not_installed(missing, extra)


def is_installed(package: str) -> bool:
    """Returns True if the package can be imported. Does not import it."""
    return importlib.util.find_spec(package) is not None


def _not_installed(packages: list[str], extra: str) -> SystemExit:
    are = "is" if len(packages) == 1 else "are"
    return fail(f"{', '.join(packages)} {are} not installed. Install with: pip install -e '.[{extra}]'")


class Reporter:
    """Shows the progress of long tasks: `with Reporter() as reporter, reporter.task(...) as task: ...`.

    If Ctrl-C, SIGTERM or SIGHUP stops the script, it prints the result of `if_stopped`. `stop` says how: see
    stopping.py. The bar needs the package rich. Without it, a terminal gets plain lines, like a file.
    """

    def __init__(self, if_stopped: Callable[[], str] = lambda: "stopped", *, stop: Stop = stops) -> None:
        self._bar, self._if_stopped, self._stop, self._open = _new_bar(), if_stopped, stop, ExitStack()

    def __enter__(self) -> "Reporter":
        self._open.enter_context(self._stop(self._say_stopped))
        if self._bar:
            self._open.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def line(self, text: str) -> None:
        """Prints a permanent line, above the progress bar if there is one."""
        if self._bar:
            # A line that is wrapped has a line break in it, so a command in it could not be copied.
            self._bar.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _say_stopped(self, number: int) -> None:
        if self._bar:
            self._bar.console.show_cursor()  # the process may end before the bar does this
        print(f"\n{self._if_stopped()}" if number == signal.SIGINT else self._if_stopped(), file=sys.stderr)

    @contextmanager
    def task(self, description: str, total: int, unit: str, done: int = 0) -> Iterator["Task"]:
        """Shows a task of `total` units, of which an earlier process has completed `done`.

        Call `advance` of the yielded task to update it.
        """
        task = Task(self._bar, description, total, unit, done)
        try:
            yield task
        finally:
            task.close()


class Task:
    """A task that a Reporter shows: as a row of its bar, or as lines if it has none."""

    def __init__(self, bar: "Progress | None", description: str, total: int, unit: str, done: int) -> None:
        self._bar, self._description, self._total, self._unit = bar, description, total, unit
        self._done, self._done_earlier, self._start = done, done, time.perf_counter()
        self._last_line = self._start
        self._row = bar.add_task(description, total=total, completed=done, note="") if bar else None

    def advance(self, amount: int, note: str = "") -> None:
        """Adds `amount` completed units and shows `note` next to the rate.

        Without a bar, prints at most one line per LINE_EVERY_SECONDS.
        """
        self._done += amount
        now = time.perf_counter()
        rate = (self._done - self._done_earlier) / (now - self._start)
        note = f"{note} {rate:.0f} {self._unit}/s".strip()
        if self._bar and self._row is not None:
            self._bar.update(self._row, advance=amount, note=note)
        elif now - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = now
            left = (self._total - self._done) / rate
            print(f"{self._description} {self._done}/{self._total} {note}, {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Removes the row."""
        if self._bar and self._row is not None:
            self._bar.remove_task(self._row)


def _new_bar() -> "Progress | None":
    """Returns a progress bar, or None if stdout is not a terminal or rich is not installed."""
    if not sys.stdout.isatty() or not is_installed("rich"):
        return None
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(),
    )
