"""The exception type of all scripts, and the decorator that reports it to the user."""

import io
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from model.checkpoint import CheckpointError
from scripts import end_imports
from scripts.common.progress import fail

P = ParamSpec("P")


class ScriptError(Exception):
    """The script cannot continue. The message is one line for the user: what is wrong and what to do."""


def reports_errors(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates an entry point: ScriptError, CheckpointError and OSError print one line and exit with status 2.

    The line begins with `name`, the name of the script. A lack of memory is reported in the same way. Other exceptions
    are bugs and keep their traceback. Names that the encoding of stdout does not have are printed with escapes.
    """

    def decorate(main: Callable[P, None]) -> Callable[P, None]:
        @wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            end_imports()
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                main(*args, **kwargs)
            except MemoryError as error:
                raise fail(f"{name}: not enough memory. Use less data, or close other programs") from error
            except (ScriptError, CheckpointError, OSError) as error:
                raise fail(f"{name}: {error}".splitlines()[0]) from error

        return run

    return decorate
