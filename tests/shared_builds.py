"""Compiles each step once for all test processes of a run, because a compilation takes most of a minute."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.compiled.compiler import library_of
from model.files import write_atomically
from model.step import ReverseStep


class SharedBuilds:
    """Replaces `compiler.build`: returns the content of a library from a folder, and compiles only if it is missing.

    Only `build` is shared. The cache folders of the service, with their checks, belong to the tests.
    """

    def __init__(self, folder: Path, build: Callable[[ReverseStep], bytes]) -> None:
        self._folder, self._build = folder, build

    @contextmanager
    def locked(self, program: ReverseStep) -> Iterator[Path]:
        """Yields the path of the library of `program`. Other processes that need this library wait until the end."""
        library = library_of(program, self._folder)
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield library

    def build(self, program: ReverseStep) -> bytes:
        """Returns what `compiler.build` returns."""
        with self.locked(program) as library:
            if not library.exists():
                write_atomically(library, self._build(program))
            return library.read_bytes()
