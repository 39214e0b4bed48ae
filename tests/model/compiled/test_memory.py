import os
import platform
import re
import subprocess
import sys

import pytest
import torch

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


# Runs a convolution with more numbers of rows than oneDNN keeps, then prints for the first and the last one whether it
# was still in the cache.
CONVOLVE = """
import torch
from model.compiled.memory import MAX_PRIMITIVES, limit_primitives

def convolve(rows):
    # In this memory layout, oneDNN does not reorder the inputs. Each reorder would be in the cache too.
    x = torch.ones(rows, 16, 2, 2).to(memory_format=torch.channels_last)
    torch.ops.mkldnn._convolution_pointwise(x, weight, None, *sizes, 1, "none", [], "")

limit_primitives()
torch.set_num_threads(1)
weight, sizes = torch.ones(16, 16, 1, 1), ([0, 0], [1, 1], [1, 1])
for rows in range(1, MAX_PRIMITIVES + 2):
    convolve(rows)
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
    for rows in 1, MAX_PRIMITIVES + 1:
        print("rows", rows, flush=True)
        convolve(rows)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_onednn_keeps_the_last_convolutions_only() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    done = subprocess.run([sys.executable, "-c", CONVOLVE], env=variables, capture_output=True, text=True, check=True)
    first, last = (re.findall(r"create:(\w+),cpu,convolution", part) for part in done.stdout.split("rows ")[1:])
    assert (first, last) == (["cache_miss"], ["cache_hit"])


# Frees 64 blocks of 1 MB between small blocks that stay, and prints the anonymous memory before, with and after them.
FREE = """
import torch
from model.compiled.memory import keep_freed_memory, return_freed_memory

def kilobytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:"))

assert keep_freed_memory()
memory = [kilobytes()]
blocks = [(torch.ones(250_000), torch.ones(25)) for _ in range(64)]
stay = [small for _, small in blocks]
del blocks
memory.append(kilobytes())
return_freed_memory()
print(*memory, kilobytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no malloc_trim")
def test_freed_memory_between_blocks_that_stay_returns_to_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    assert after - before < (kept - before) / 4
