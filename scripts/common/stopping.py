"""Stops a script at Ctrl-C, SIGTERM or SIGHUP, with a message and the exit status 130, 143 or 129."""

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE_SECONDS = 1.0  # from the signal to the end of the process, if the main thread does not end it earlier
Say = Callable[[int], None]  # prints the message for the number of a signal


@contextmanager
def stops(say: Say, signals: Sequence[int] = (signal.SIGTERM, signal.SIGHUP)) -> Iterator[list[int]]:
    """Calls `say` if Ctrl-C or one of the signals stops the block. Yields the list of the signals that have arrived.

    A signal that was ignored before, such as SIGHUP under nohup, remains ignored.
    """
    received = list[int]()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        warnings.simplefilter("ignore")  # torch warns if an exception passes through its C++ code
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(_status_of(number))

    numbers = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    except KeyboardInterrupt:
        say(signal.SIGINT)
        raise SystemExit(_status_of(signal.SIGINT)) from None
    except SystemExit:
        if received:
            say(received[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stops_soon(say: Say) -> Iterator[None]:
    """Does the same as `stops`, but a signal ends the process within little more than PATIENCE_SECONDS.

    With `stops` it can take half a minute: native code or a library can keep the exception from the main thread, and
    after torch has compiled, the interpreter is slow to free its objects. Here a thread ends the process if the main
    thread does not, and the interpreter frees nothing. Use this only if all files stay valid when the process is killed
    and no child process is left behind.
    """
    unsaid = threading.Lock()

    def say_once(number: int) -> None:
        if unsaid.acquire(blocking=False):
            say(number)

    def watch() -> None:
        while (number := os.read(reading, 1)[0]) not in SIGNALS:
            if not number:
                return
        threading.Event().wait(PATIENCE_SECONDS)
        say_once(number)
        _leave(_status_of(number))

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    # The C handler of a signal writes its number, also while the main thread runs native code.
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        with stops(say_once, SIGNALS) as received:
            yield
    except SystemExit:
        if received:
            atexit._run_exitfuncs()  # for example to remove temporary folders; os._exit does not call them
            _leave(_status_of(received[0]))
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")  # no signal has this number
        watcher.join()
        os.close(reading)
        os.close(writing)


def _status_of(number: int) -> int:
    """Returns the exit status that shells report for a process that a signal ended."""
    return 128 + number


def _leave(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # for example a closed pipe
            stream.flush()
    os._exit(status)
