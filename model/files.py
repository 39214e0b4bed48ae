"""Writes files atomically: a reader sees the old file or the complete new one."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a temporary file in the same folder, then renames it to `path`. Creates the folder if it does not exist.

    The file has mode 0644. Raises OSError if it cannot be written. The old file is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException as error:
            Path(file.name).unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and not error.filename:  # such as that of a full disk
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


def check_writable(folder: Path) -> None:
    """Creates the folder if it does not exist. Raises OSError if no file can be written in it.

    Call it before work whose result is lost if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def write_json(path: Path, content: Any) -> None:
    """Writes compact JSON and a final newline, atomically."""
    write_atomically(path, f"{json.dumps(content, separators=(',', ':'))}\n".encode())
