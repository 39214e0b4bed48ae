"""Command-line programs for training, sampling, evaluation, plots and measurements. They import `app` and `model`."""

import os
import signal
import sys
from types import FrameType


def end_imports() -> None:
    """Gives Ctrl-C its usual effect again. asyncio, for example, ends its tasks only if it finds the usual handler."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C. Importing torch takes seconds, and a program that is stopped meanwhile has nothing to lose.

    If a program with a function `main` has not called `end_imports` yet, this raises KeyboardInterrupt.
    """
    if hasattr(sys.modules["__main__"], "main"):
        signal.default_int_handler(number, frame)
    module = next(argument for argument in sys.orig_argv if "scripts." in argument)
    os.write(2, f"\n{module.rpartition('.')[2]}: stopped before it began\n".encode())
    os._exit(128 + number)


# sys.argv[0] is "-m" while Python imports this package for `python -m scripts.NAME`. A background job of a shell script
# ignores the signal, and continues to do so.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
