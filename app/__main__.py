"""`python -m app`: see cli.py."""

import os
import signal

# The imports take seconds, in which nothing has been promised to anybody: a stop is a clean one.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

from app.cli import main  # noqa: E402

main()
