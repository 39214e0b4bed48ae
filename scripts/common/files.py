"""Files that scripts leave: whole, or not at all."""

import json
from pathlib import Path
from typing import Any

from model.checkpoint import write_atomically


def write_json(path: Path, content: Any) -> None:
    """Writes compact JSON with a newline at its end."""
    write_atomically(path, f"{json.dumps(content, separators=(',', ':'))}\n".encode())
