"""The error of all scripts, and how an entry point reports it."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from model.checkpoint import CheckpointError
from scripts.common.progress import fail

P = ParamSpec("P")


class ScriptError(Exception):
    """A script cannot continue. The message is one sentence for the user."""


def reports_errors(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Makes an entry point print one sentence and exit with status 2 for an error that the user can correct.

    These errors are ScriptError, CheckpointError and OSError. The sentence begins with the script's name.
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
