"""Entry point of `python -m app`. Runs the command line in cli.py."""

import os
import signal

# The imports take seconds. No request is accepted during this time, so SIGTERM can exit immediately with status 0.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

# Open the descriptors 0 to 2 if they are closed. Otherwise the next file or socket would get such a number, and
# text that is printed to stdout or stderr would be written to it.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(descriptor)

from app.cli import main  # noqa: E402

main()
