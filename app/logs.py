"""Configures logging: readable lines on a terminal, otherwise JSON lines. Each item of `extra` becomes a field.

The thread that logs also formats the line. Another thread writes it (log_writer.py). Formatting in the writing thread
would keep tracebacks, with their frames and request bodies, in memory while stderr is blocked, and would show objects
in a later state. The event loop also formats lines, so the work per line is limited: a traceback has at most
MAX_EXCEPTIONS exceptions with MAX_FRAMES frames each, and long texts are shortened.
"""

import asyncio
import atexit
import io
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import structlog
from structlog.typing import EventDict, ExcInfo, WrappedLogger

from app.log_writer import LogWriter, make_nonblocking

# Fields that console lines omit, to keep them short.
_JSON_ONLY = (
    *("logger", "color_message", "client", "route", "trace_id", "span_id"),
    *("model", "seed", "num_steps", "sampler", "guidance_scale"),
)
PROTOCOL_LOGGER = "uvicorn.error.protocol"  # used by app/server/connection.py
# The attributes of every record, and a field for uvicorn's own console formatter. Others are the items of `extra`.
_STANDARD = {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "taskName", "color_message"}
MAX_TEXT = 4096  # limit of characters in a field; the middle of a longer text is omitted
MAX_TRACEBACK = 16_384
MAX_FRAMES = 30  # limit of frames per exception; the innermost ones are kept
MAX_EXCEPTIONS = 8  # limit for the exception, its causes and the members of its groups together
MAX_LINE = 2**17  # limit of characters in a line; JSON escapes can make a text six times as long
STDERR = 2
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters except tab and newline

_writers: list[LogWriter] = []  # at most one writer; the metric of dropped lines reads it


def start_log() -> LogWriter:
    """Starts the thread that writes to stderr. A normal exit of the process flushes its queue."""
    make_nonblocking(STDERR)
    writer = LogWriter(STDERR)
    _writers[:] = [writer]
    atexit.register(writer.flush)
    return writer


def extra_of(record: logging.LogRecord) -> dict[str, Any]:
    """Returns the items of `extra`, without names that begin with an underscore: Ray adds one to each record."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and name[0] != "_"}


def num_lines_dropped() -> int:
    return sum(writer.num_dropped for writer in _writers)


def configure_logging(log_format: str, level: str, writer: LogWriter) -> logging.Handler:
    """Sends all log records to the writer and returns the handler. `auto` is console on a terminal, otherwise JSON."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # No formatter writes these facts.
    is_terminal = os.isatty(writer.descriptor)
    console = log_format == "console" or (log_format == "auto" and is_terminal)
    handler = _QueueHandler(writer)
    handler.setFormatter(_console_formatter(is_terminal) if console else _JSONFormatter())
    writer.describe_drop = handler.describe_drop
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True  # The access log of this service replaces that of uvicorn.
    for name in ("uvicorn.error", PROTOCOL_LOGGER):
        logging.getLogger(name).addFilter(is_not_cancellation)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))
    return handler


def capture_stderr(handler: logging.Handler) -> None:
    """Logs what Python code writes to stderr: prints, warnings, and uncaught exceptions of threads."""
    sys.stderr = _LoggedStream(handler)
    logging.captureWarnings(capture=True)
    threading.excepthook = _log_exception_of_thread
    sys.unraisablehook = _log_unraisable


def is_not_cancellation(record: logging.LogRecord) -> bool:
    """Filters out uvicorn's errors about requests that a shutdown cancels. They are expected."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)) and (
        "asyncio.exceptions.CancelledError" not in record.getMessage()
    )


class _QueueHandler(logging.Handler):
    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if len(line) > MAX_LINE:
                line = self._format_instead(record, reason="too long", characters=len(line), limit=MAX_LINE)
        except Exception as error:
            line = self._format_instead(record, reason="formatting failed", error=type(error).__name__)
        self._writer.put(f"{line}\n")

    def describe_drop(self, count: int) -> str:
        """Returns the log line that reports `count` dropped lines."""
        record = logging.LogRecord("unfog.log", logging.WARNING, "", 0, "Dropped log lines", (), None)
        record.count = count
        return f"{self.format(record)}\n"

    def _format_instead(self, record: logging.LogRecord, **fields: str | int) -> str:
        omitted = logging.LogRecord(record.name, record.levelno, "", 0, "Log record omitted", (), None)
        vars(omitted).update(fields)
        return self.format(omitted)


class _LoggedStream(io.TextIOBase):
    """Replaces sys.stderr and logs each printed line. Text of different threads is not mixed within a line."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, handler: logging.Handler) -> None:
        self._handler, self._unfinished = handler, threading.local()

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._unfinished, "line", "") + text).split("\n")
        if len(rest) > MAX_TEXT:
            lines, rest = [*lines, rest], ""
        self._unfinished.line = rest
        self._emit(lines)
        return len(text)

    def flush(self) -> None:
        rest, self._unfinished.line = getattr(self._unfinished, "line", ""), ""
        self._emit([rest])

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return STDERR

    def isatty(self) -> bool:
        return os.isatty(STDERR)

    def _emit(self, lines: list[str]) -> None:
        for line in filter(str.strip, lines):
            self._handler.handle(logging.LogRecord("stderr", logging.WARNING, "", 0, line, (), None))


def _log_exception_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "unknown"
        logging.getLogger("unfog.thread").error(
            "Uncaught exception in a thread", exc_info=args.exc_value, extra={"thread_name": name}
        )


def _log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    logging.getLogger("unfog.thread").error(
        unraisable.err_msg or "Exception ignored", exc_info=unraisable.exc_value, extra={"object": unraisable.object}
    )


def _format_exc_info(exc_info: ExcInfo) -> str:
    """Formats an exception like traceback.format_exception(), but with limited length and time."""
    parts: list[str] = []
    error: BaseException | None = exc_info[1]  # None for log.exception() outside of an except block
    pending = [(error, "")] if error else []
    while pending and len(parts) < MAX_EXCEPTIONS:
        error, relation = pending.pop(0)
        parts.append(f"{_format_traceback(error.__traceback__)}{_describe(error)}{relation}")
        pending += _related(error)
    if pending:
        parts.append("Further exceptions omitted.\n\n")
    return "".join(reversed(parts))


def _format_traceback(last_frames: TracebackType | None) -> str:
    depth, frame = 0, last_frames
    while frame:
        depth, frame = depth + 1, frame.tb_next
    for _ in range(depth - MAX_FRAMES):
        assert last_frames
        last_frames = last_frames.tb_next
    omitted = f"  {depth - MAX_FRAMES} frames omitted\n" if depth > MAX_FRAMES else ""
    return f"Traceback (most recent call last):\n{omitted}{''.join(traceback.format_tb(last_frames))}" if depth else ""


def _describe(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        text = str(error)
    except Exception:
        text = "<str() of this exception raised an exception>"
    return "\n".join([f"{name}: {_cut(text, MAX_TEXT)}" if text else name, *map(str, getattr(error, "__notes__", ()))])


def _related(error: BaseException) -> Iterator[tuple[BaseException, str]]:
    """Yields the exceptions that are printed before this one, and the text between it and each of them."""
    if error.__cause__:
        yield error.__cause__, "\n\nThe above exception was the direct cause of the following exception:\n\n"
    elif error.__context__ and not error.__suppress_context__:
        yield error.__context__, "\n\nDuring handling of the above exception, another exception occurred:\n\n"
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield member, "\n\nThe above exception is a member of the following group:\n\n"


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters omitted ... {text[-half:]}"


def _add_extra(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event.update(extra_of(event["_record"]))
    return event


def _cut_long_texts(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _cut(value, MAX_TRACEBACK if name == "exception" else MAX_TEXT)
    return event


def _console_formatter(colours: bool) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            _add_extra,
            structlog.processors.TimeStamper("%H:%M:%S", utc=False, key="time"),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.ExceptionRenderer(_format_exc_info),
            _cut_long_texts,
            _without_json_only,
            _readable,
            structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=0, timestamp_key="time", sort_keys=False),
        ],
    )


class _JSONFormatter(logging.Formatter):
    """Formats a record as JSON. The event loop formats a line for each request. structlog takes twice as long."""

    def __init__(self) -> None:
        super().__init__()
        self._encode = json.JSONEncoder(default=repr).encode

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event |= extra_of(record)
        if record.stack_info:
            event["stack_info"] = record.stack_info
        if record.exc_info and record.exc_info[1]:
            event["exception"] = _format_exc_info(record.exc_info)
        line = self._encode(event)
        return line if len(line) <= MAX_TEXT else self._encode(_cut_long_texts(None, "", event))


def _readable(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Writes booleans as in JSON, and escapes control characters that a terminal would interpret."""
    for name, value in event.items():
        if isinstance(value, bool):
            event[name] = str(value).lower()
        elif isinstance(value, str):
            event[name] = _CONTROL.sub(lambda control: f"\\x{ord(control[0]):02x}", value)
    return event


def _without_json_only(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {name: value for name, value in event.items() if name not in _JSON_ONLY}
