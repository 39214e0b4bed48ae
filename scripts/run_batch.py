"""Answers the lines of a batch without a server: `python -m scripts.run_batch -i in.jsonl -o out.jsonl`.

The lines are those of an input file of POST /v1/batches. The output has a line for each of them, also for those that
have failed, in the order in which they end. If the script is stopped or killed, start it again with the same arguments:
it keeps the complete lines of the output and answers the others. The settings of the service apply (UNFOG_MODELS,
UNFOG_DEVICE, ...). There is one exception: if the engine fails, the script also ends with UNFOG_GIVE_UP_SECONDS=never.

The input is read twice, because all lines are checked before the first one is answered. If the file changes meanwhile,
the script ends with an error. A line that has changed is not answered: its seed would follow from the earlier content.
"""

import asyncio
import fcntl
import json
import os
import stat
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
from app.batches.lines import InputLine, InputReader, num_images_of
from app.batches.records import Line, LineAnswer
from app.batches.runner import FEWEST_IMAGES, MOST_BYTES
from app.engine.interface import RunnerError
from app.engine.watchdog import Watchdog
from app.main import LINE_ROUTERS, create_app
from app.settings import Settings, SettingsError, load_settings
from scripts.common.arguments import Parser
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.progress import Reporter, Task
from scripts.common.stopping import stops_soon

NO_LIMIT = sys.maxsize
GIVE_UP_SECONDS = 30.0  # with UNFOG_GIVE_UP_SECONDS=never
START = b'{"id": "batch_req_'  # the first bytes of every line of an output


@dataclass(frozen=True, slots=True)
class Batch:
    """The input: its lines, their common url, and an id that follows from the content of the file."""

    path: Path
    id: str
    endpoint: str
    hashes: dict[int, int]  # of the lines, by their numbers

    @property
    def num_lines(self) -> int:
        return len(self.hashes)

    def has(self, line: InputLine) -> bool:
        """Returns False if the line has changed since all lines were checked."""
        return self.hashes.get(line.number) == hash(line)


@dataclass(slots=True)
class Answered:
    """The lines that have an answer in the output."""

    ids: set[str]
    num_failed: int


class Source:
    """Reads the input once. The id of the batch follows from all that was read."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest = path, sha256()

    def blocks(self) -> Iterator[bytes]:
        """Yields the content of the file in blocks."""
        with self._path.open("rb") as file:
            while block := file.read(CHUNK_BYTES):
                self._digest.update(block)
                yield block

    @property
    def batch_id(self) -> str:
        return f"batch_{self._digest.hexdigest()[:24]}"


@reports_errors("run_batch")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    batch = read_batch(args.input)
    with args.output.open("a+b") as output, tempfile.TemporaryDirectory() as folder:
        lock(output, args.output)
        answered = read_output(output, args.output, batch)
        # The run must not use the database of a service on this machine.
        settings = read_settings().model_copy(update={"data_dir": Path(folder) / "none", "database_url": None})
        stopped = f"run_batch: stopped. Start it again with the same arguments to answer the other lines: {args.output}"
        with Reporter(lambda: stopped, stop=stops_soon) as reporter:
            if len(answered.ids) < batch.num_lines:
                asyncio.run(answer_all(settings, batch, answered, output, reporter))
            reporter.line(f"{len(answered.ids)} lines answered, {answered.num_failed} of them failed: {args.output}")
    if answered.num_failed:
        sys.exit(1)


def read_batch(path: Path) -> Batch:
    """Checks all lines of the input. Raises ScriptError for the first invalid one."""
    if not stat.S_ISREG(path.stat().st_mode):  # A pipe would be empty when its lines are read again to answer them.
        raise ScriptError(f"{path} is not a regular file. Write the lines to a file first")
    source, reader = Source(path), InputReader(None, NO_LIMIT, LineRequests.endpoints_of(LINE_ROUTERS))
    hashes = {line.number: hash(line) for line in reader.read(source.blocks())}
    if reader.errors:
        error = reader.errors[0]
        place = f"{path}, line {error.line}" if error.line else str(path)
        raise ScriptError(f"{place}: {error.message}")
    assert reader.endpoint, "a file without errors has a line"
    return Batch(path, source.batch_id, reader.endpoint, hashes)


def lock(output: BinaryIO, path: Path) -> None:
    """Keeps another process from writing to the same output."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ScriptError(f"{path} is being written by another process. Use another file for -o") from None


def read_output(output: BinaryIO, path: Path, batch: Batch) -> Answered:
    """Returns the lines that an earlier run has answered.

    Removes a last line that is incomplete, because the run was killed while it wrote it.
    """
    answered, end = Answered(set(), 0), 0
    ids = {request_id_of(batch.id, number) for number in batch.hashes}
    output.seek(0)
    for text in output:
        if not text.endswith(b"\n") and text[: len(START)] == START[: len(text)]:
            break
        try:
            line = json.loads(text)
            if line["id"] not in ids:
                raise ScriptError(f"{path} has answers to the lines of another file. Use another file for -o")
            answered.ids.add(line["id"])
            answered.num_failed += not 200 <= line["response"]["status_code"] < 300
        except (ValueError, KeyError, TypeError):
            raise ScriptError(f"{path} is not an output of this script. Use another file for -o") from None
        end += len(text)
    output.truncate(end)
    return answered


async def answer_all(
    settings: Settings, batch: Batch, answered: Answered, output: BinaryIO, reporter: Reporter
) -> None:
    """Answers the lines that have no answer yet, and adds them to `answered`.

    Raises ScriptError if the engine does not start or is lost, or if the input has changed.
    """
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        engine = app.state.service.engine
        try:
            await asyncio.shield(asyncio.wrap_future(engine.ready))  # A signal must not cancel the future.
        except RunnerError as error:
            raise ScriptError(str(error)) from error
        watchdog = Watchdog(engine, settings.give_up_seconds or GIVE_UP_SECONDS)
        watchdog.start()
        with reporter.task("lines", batch.num_lines, "lines", len(answered.ids)) as task:
            answering = asyncio.ensure_future(OfflineRun(app, batch, answered, output, task).run())
            await asyncio.wait((answering, watchdog.lost), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return await answering
            answering.cancel()  # The lines would wait for the engine forever.
            await asyncio.wait((answering,))
        raise ScriptError("The engine has failed. Start the script again to answer the other lines")


class OfflineRun:
    """Answers lines with as many of them in progress as the engine needs, and writes each answer at once.

    The memory of the lines in progress is limited, too, because a line can have pictures.
    """

    def __init__(self, app: FastAPI, batch: Batch, answered: Answered, output: BinaryIO, task: Task) -> None:
        self._lines: LineRequests = app.state.lines
        self._engine = app.state.service.engine
        self._batch, self._answered, self._output, self._task = batch, answered, output, task
        self._num_images = self._num_bytes = 0  # of the lines in progress
        self._has_room = asyncio.Event()

    async def run(self) -> None:
        """Answers the lines that have no answer yet.

        Raises OSError if an answer cannot be written, and ScriptError if the input has changed.
        """
        try:
            await self._answer_missing()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        os.fsync(self._output.fileno())

    async def _answer_missing(self) -> None:
        source, reader = Source(self._batch.path), InputReader(self._batch.endpoint, NO_LIMIT, ())
        async with asyncio.TaskGroup() as group:
            for line in reader.read(source.blocks()):
                if not self._batch.has(line):
                    raise self._changed()
                if request_id_of(self._batch.id, line.number) in self._answered.ids:
                    continue
                images = num_images_of(line.body)
                while self._is_full(len(line.body)):
                    self._has_room.clear()
                    await self._has_room.wait()
                self._num_images += images
                self._num_bytes += len(line.body)
                wanted = Line(self._batch.id, line.number, line.custom_id, self._batch.endpoint, line.body)
                group.create_task(self._answer(wanted, images))
        if source.batch_id != self._batch.id:  # A line is missing or invalid now.
            raise self._changed()

    def _is_full(self, num_bytes: int) -> bool:
        """Returns True if a line of this size must wait. One line can always be in progress."""
        if self._num_images >= max(FEWEST_IMAGES, 2 * self._engine.full_step()):
            return True
        return self._num_bytes > 0 and self._num_bytes + num_bytes > MOST_BYTES

    def _changed(self) -> ScriptError:
        path = self._batch.path
        return ScriptError(f"{path} has changed while it was read. Restore it, or use another file for -o")

    async def _answer(self, line: Line, images: int) -> None:
        answer: LineAnswer = await self._lines.answer(line)
        self._output.write(result_of(line, answer) + b"\n")
        self._output.flush()
        self._answered.ids.add(request_id_of(line.batch_id, line.number))
        self._answered.num_failed += not 200 <= answer.status < 300
        self._num_images -= images
        self._num_bytes -= len(line.body)
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
