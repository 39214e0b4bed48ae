import platform
import subprocess
import sys

import pytest

# Takes and frees 64 MB thirty times, in a thread as the engine does, and prints how many pages had to be faulted in.
FAULTS = """
import resource, sys, threading
import torch
from model.compiled.memory import keep_freed_memory

def work():
    for _ in range(30):
        torch.ones(16_000_000)

assert sys.argv[1] == "default" or keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
def test_pages_that_were_freed_are_not_faulted_in_again() -> None:
    assert faults("kept") < faults("default") / 5
