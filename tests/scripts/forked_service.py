"""Starts the measured service as a fork, because a benchmark starts it several times and the imports take seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.e2e.fork import Fork


class ForkedService(Fork):
    """Replaces subprocess.Popen in scripts.benchmark.services for `python -m app`."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None, **_: object) -> None:
        _python, option, module = command
        assert option == "-m"
        super().__init__(module, str(cwd or Path.cwd()), dict(env))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stderr.close()
