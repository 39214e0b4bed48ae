"""Reads the memory limits of the compose files, which other files repeat."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def memory_limit(file: str) -> str:
    """Returns the default memory limit of the service in a compose file."""
    (limit,) = re.findall(r"mem_limit: \$\{UNFOG_MEMORY:-(\d+g)\}", (ROOT / file).read_text())
    return str(limit)
