"""What else goes on while a service is measured; each stops by itself when its block ends."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FLOOD_CONNECTIONS = 8
SPIN = "print(flush=True)\nwhile True: pass"
FLOOD = """
import http.client, sys, threading
def ask():
    connection = http.client.HTTPConnection(sys.argv[1])
    while True:
        connection.request("GET", "/livez")
        connection.getresponse().read()
threads = [threading.Thread(target=ask, daemon=True) for _ in range(int(sys.argv[2]))]
for thread in threads: thread.start()
print(flush=True)
threads[0].join()
"""  # it ends when a request fails


@contextmanager
def disturbance(kind: str, url: str) -> Iterator[Callable[[], bool]]:
    """`busy core`: a process that computes without end; `flood`: one that asks GET /livez as fast as it is answered.

    It goes on when the block begins; the block is given a way to ask whether it still does.
    """
    if not kind:
        yield lambda: True
        return
    address = url.removeprefix("http://")
    program = {"busy core": [SPIN], "flood": [FLOOD, address, str(FLOOD_CONNECTIONS)]}[kind]
    with subprocess.Popen([sys.executable, "-c", *program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield lambda: process.poll() is None
        finally:
            process.kill()
