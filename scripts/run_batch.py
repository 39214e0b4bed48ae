"""Answers the lines of a batch without a server: `python -m scripts.run_batch -i in.jsonl -o out.jsonl`.

The lines are those of an input file of POST /v1/batches. The output has a line for each of them, also for those that
have failed, in the order in which they end. If the script is stopped or killed, start it again with the same arguments:
it keeps the complete lines of the output and answers the others. The settings of the service apply (UNFOG_MODELS,
UNFOG_DEVICE, ...).
"""

import asyncio
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from fastapi import FastAPI

from app.api.line_requests import LineRequests
from app.batches.batches import request_id_of, result_of
from app.batches.files import CHUNK_BYTES
from app.batches.lines import InputReader, num_images_of
from app.batches.records import Line, LineAnswer
from app.batches.runner import FEWEST_IMAGES
from app.engine.interface import RunnerError
from app.engine.watchdog import Watchdog
from app.main import LINE_ROUTERS, create_app
from app.settings import Settings, SettingsError, load_settings
from scripts.common.arguments import Parser
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.progress import Reporter, Task
from scripts.common.stopping import stops_soon

NO_LIMIT = sys.maxsize
START = b'{"id": "batch_req_'  # the first bytes of every line of an output


@dataclass(frozen=True, slots=True)
class Batch:
    """The input: the numbers of its lines, their common url, and an id that follows from the content of the file."""

    path: Path
    id: str
    endpoint: str
    numbers: list[int]

    @property
    def num_lines(self) -> int:
        return len(self.numbers)


@reports_errors("run_batch")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    batch = read_batch(args.input)
    with args.output.open("a+b") as output, tempfile.TemporaryDirectory() as folder:
        lock(output, args.output)
        done, num_failed = read_output(output, args.output, batch)
        # The run must not use the database of a service on this machine.
        settings = read_settings().model_copy(update={"data_dir": Path(folder) / "none", "database_url": None})
        stopped = f"run_batch: stopped. Start it again with the same arguments to answer the other lines: {args.output}"
        with Reporter(lambda: stopped, stop=stops_soon) as reporter:
            if len(done) < batch.num_lines:
                num_failed += asyncio.run(answer_all(settings, batch, done, output, reporter))
            reporter.line(f"{batch.num_lines} lines answered, {num_failed} of them failed: {args.output}")
    if num_failed:
        sys.exit(1)


def read_batch(path: Path) -> Batch:
    """Checks all lines of the input. Raises ScriptError for the first invalid one."""
    reader, digest = InputReader(None, NO_LIMIT, LineRequests.endpoints_of(LINE_ROUTERS)), sha256()

    def blocks() -> Iterator[bytes]:
        for block in read_blocks(path):
            digest.update(block)
            yield block

    numbers = [line.number for line in reader.read(blocks())]
    if reader.errors:
        error = reader.errors[0]
        place = f"{path}, line {error.line}" if error.line else str(path)
        raise ScriptError(f"{place}: {error.message}")
    assert reader.endpoint, "a file without errors has a line"
    return Batch(path, f"batch_{digest.hexdigest()[:24]}", reader.endpoint, numbers)


def read_blocks(path: Path) -> Iterator[bytes]:
    """Yields the content of a file in blocks."""
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            yield block


def lock(output: BinaryIO, path: Path) -> None:
    """Keeps another process from writing to the same output."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ScriptError(f"{path} is being written by another process. Use another file for -o") from None


def read_output(output: BinaryIO, path: Path, batch: Batch) -> tuple[set[str], int]:
    """Returns the ids of the lines that an earlier run has answered, and the number of those that failed.

    Removes a last line that is incomplete, because the run was killed while it wrote it.
    """
    done, num_failed, end = set[str](), 0, 0
    ids = {request_id_of(batch.id, number) for number in batch.numbers}
    output.seek(0)
    for text in output:
        if not text.endswith(b"\n") and text[: len(START)] == START[: len(text)]:
            break
        try:
            line = json.loads(text)
            if line["id"] not in ids:
                raise ScriptError(f"{path} has answers to the lines of another file. Use another file for -o")
            done.add(line["custom_id"])
            num_failed += not 200 <= line["response"]["status_code"] < 300
        except (ValueError, KeyError, TypeError):
            raise ScriptError(f"{path} is not an output of this script. Use another file for -o") from None
        end += len(text)
    output.truncate(end)
    return done, num_failed


async def answer_all(settings: Settings, batch: Batch, done: set[str], output: BinaryIO, reporter: Reporter) -> int:
    """Answers the lines that are not done. Returns the number of those that failed.

    Raises ScriptError if the engine does not start or is lost.
    """
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        engine = app.state.service.engine
        try:
            await asyncio.shield(asyncio.wrap_future(engine.ready))  # A signal must not cancel the future.
        except RunnerError as error:
            raise ScriptError(str(error)) from error
        watchdog = Watchdog(engine, settings.give_up_seconds)
        watchdog.start()
        with reporter.task("lines", batch.num_lines, "lines", len(done)) as task:
            answering = asyncio.ensure_future(OfflineRun(app, batch, output, task).run(done))
            await asyncio.wait((answering, watchdog.lost), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            answering.cancel()  # The lines would wait for the engine forever.
            await asyncio.wait((answering,))
        raise ScriptError("The engine has failed. Start the script again to answer the other lines")


class OfflineRun:
    """Answers lines with as many of them in progress as the engine needs, and writes each answer at once."""

    def __init__(self, app: FastAPI, batch: Batch, output: BinaryIO, task: Task) -> None:
        self._lines: LineRequests = app.state.lines
        self._engine = app.state.service.engine
        self._batch, self._output, self._task = batch, output, task
        self._num_images = self._num_failed = 0
        self._has_room = asyncio.Event()

    async def run(self, done: set[str]) -> int:
        """Answers the lines whose custom_id is not in `done`. Returns the number of those that failed.

        Raises OSError if an answer cannot be written.
        """
        try:
            await self._answer_missing(done)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        os.fsync(self._output.fileno())
        return self._num_failed

    async def _answer_missing(self, done: set[str]) -> None:
        reader = InputReader(self._batch.endpoint, NO_LIMIT, ())
        async with asyncio.TaskGroup() as group:
            for line in reader.read(read_blocks(self._batch.path)):
                if line.custom_id in done:
                    continue
                images = num_images_of(line.body)
                while self._num_images >= max(FEWEST_IMAGES, 2 * self._engine.full_step()):
                    self._has_room.clear()
                    await self._has_room.wait()
                self._num_images += images
                wanted = Line(self._batch.id, line.number, line.custom_id, self._batch.endpoint, line.body)
                group.create_task(self._answer(wanted, images))

    async def _answer(self, line: Line, images: int) -> None:
        answer: LineAnswer = await self._lines.answer(line)
        self._output.write(result_of(line, answer) + b"\n")
        self._output.flush()
        self._num_failed += not 200 <= answer.status < 300
        self._num_images -= images
        self._has_room.set()
        self._task.advance(1)


def read_settings() -> Settings:
    """Returns the settings of the environment. Raises ScriptError."""
    try:
        return load_settings()
    except SettingsError as error:
        raise ScriptError(str(error)) from error


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.run_batch", description=__doc__)
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="IN.jsonl", help="file with the lines")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.jsonl", help="file to which the answers are appended"
    )
    return parser


if __name__ == "__main__":
    main()
