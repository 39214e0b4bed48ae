import platform
import subprocess
import sys

import pytest

# Allocates and frees 64 MB 30 times, in a thread as the engine does, and prints the number of page faults.
COUNT_PAGE_FAULTS = """
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


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
def test_freed_pages_cause_no_new_page_faults() -> None:
    assert page_faults("kept") < page_faults("default") / 5
