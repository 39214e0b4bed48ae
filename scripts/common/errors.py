"""The exception type of all scripts, and the decorator that reports it to the user."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from model.checkpoint import CheckpointError
from scripts.common.progress import fail

P = ParamSpec("P")


class ScriptError(Exception):
    """The script cannot continue. The message is one line for the user: what is wrong and what to do."""


def reports_errors(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates an entry point: ScriptError, CheckpointError and OSError print one line and exit with status 2.

    The line begins with `name`, the name of the script. Other exceptions are bugs and keep their traceback.
    """

    def decorate(main: Callable[P, None]) -> Callable[P, None]:
        @wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                main(*args, **kwargs)
            except (ScriptError, CheckpointError, OSError) as error:
                raise fail(f"{name}: {error}".splitlines()[0]) from error

        return run

    return decorate
