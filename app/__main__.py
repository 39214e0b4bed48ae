"""`python -m app`: see cli.py."""

import os
import signal

# The imports take seconds. Nothing has been accepted until then, so a stop is a clean one.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

# The number of a closed standard stream would go to the next file or socket, which would then receive what is printed.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(descriptor)

from app.cli import main  # noqa: E402

main()
