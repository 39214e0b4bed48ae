"""Runs the command line of cli.py for `python -m app`."""

import os
import signal

# The imports take seconds. No request is accepted before they end, so SIGTERM may end the process with status 0.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

# If a standard stream is closed, the next file or socket gets its number and would receive what is printed.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(descriptor)

from app.cli import main  # noqa: E402

main()
