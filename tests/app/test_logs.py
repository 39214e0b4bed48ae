import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from app import logs
from app.log_writer import LogWriter
from app.logs import MAX_EXCEPTIONS, MAX_LINE, MAX_TEXT, MAX_TRACEBACK, capture_stderr, configure_logging

WAIT_SECONDS = 30.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers, root.level = handlers, level
    logging.getLogger("uvicorn").setLevel(logging.NOTSET)
    logging.getLogger("uvicorn.access").disabled = False


class Log:
    """Writes the log of this process to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = LogWriter(os.open(path, os.O_WRONLY | os.O_CREAT))
        self.handler: logging.Handler = logging.NullHandler()

    def configure(self, log_format: str, level: str) -> None:
        self.handler = configure_logging(log_format, level, self._writer)

    def lines(self) -> list[str]:
        self._writer.flush(WAIT_SECONDS)
        return self._path.read_text().splitlines()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


def test_json_line_contains_extra_items_as_fields(log: Log) -> None:
    log.configure("json", "info")
    logging.getLogger("unfog.x").warning("%d of %d", 1, 2, extra={"request_id": "an-id", "seconds": 0.5})
    (line,) = log.lines()
    fields = json.loads(line)
    assert list(fields)[:4] == ["time", "level", "logger", "message"]  # the fields of every line come first
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "warning",
        "logger": "unfog.x",
        "message": "1 of 2",
        "request_id": "an-id",
        "seconds": 0.5,
    }


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_attributes_that_ray_gives_each_record_are_not_logged(log: Log, log_format: str) -> None:
    create = logging.getLogRecordFactory()

    def create_as_ray(*args: Any, **options: Any) -> logging.LogRecord:
        record = create(*args, **options)
        record._ray_timestamp_ns = 5
        return record

    logging.setLogRecordFactory(create_as_ray)
    try:
        log.configure(log_format, "info")
        logging.getLogger("unfog.x").warning("text", extra={"request_id": "an-id"})
    finally:
        logging.setLogRecordFactory(create)
    (line,) = log.lines()
    assert "an-id" in line
    assert "ray" not in line


def test_values_that_json_cannot_represent_are_logged_in_one_line(log: Log) -> None:
    log.configure("json", "info")
    logging.getLogger("x").info("a\nb \ud800 \x1b[31m", extra={"thing": object()})
    (line,) = log.lines()
    assert json.loads(line)["message"].startswith("a\nb ")


def test_exception_is_a_field_of_the_line(log: Log) -> None:
    log.configure("json", "info")
    try:
        raise ArithmeticError("too much")
    except ArithmeticError:
        logging.getLogger("x").exception("it failed")
    (line,) = log.lines()
    assert json.loads(line)["exception"].endswith("ArithmeticError: too much")


def test_json_line_has_the_fields_that_structlog_writes(log: Log) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            structlog.stdlib.ExtraAdder(["none", "flag", "numbers", "thing", "infinite"]),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ],
    )
    log.configure("json", "debug")
    expected: list[str] = []
    log.handler.addFilter(lambda record: expected.append(formatter.format(record)) is None)
    logger = logging.getLogger("unfog.x")
    logger.log(25, "%(name)s", {"name": "value"}, extra={"none": None, "flag": True, "numbers": [1, 2.5, (3,)]})
    logger.critical("both %s", b"bytes", extra={"thing": {1}, "infinite": float("inf")})
    logger.exception("outside of an except block")
    logger.debug({"a": "dict"})
    lines = [json.loads(line) for line in log.lines()]
    assert [line.pop("time")[-1] for line in lines] == ["Z"] * 4
    assert lines == [json.loads(line) for line in expected]


def test_stack_is_a_field_of_the_line(log: Log) -> None:
    log.configure("json", "info")
    logging.getLogger("x").info("here", stack_info=True)
    assert json.loads(log.lines()[0])["stack_info"].startswith("Stack (most recent call last):")


def test_console_line_omits_fields_that_only_json_lines_have(log: Log) -> None:
    log.configure("console", "info")
    logging.getLogger("unfog.access").info("POST /generate", extra={"status": 200, "digit": 7, "sampler": "ddpm"})
    (line,) = log.lines()
    assert "info" in line
    assert "POST /generate" in line
    assert "status=200" in line
    assert "digit=7" in line
    assert "sampler" not in line
    assert "\x1b" not in line  # colours are used only on a terminal


def test_log_format_auto_is_json_without_a_terminal(log: Log) -> None:
    log.configure("auto", "warning")
    logging.getLogger("x").info("below the level")
    logging.getLogger("x").warning("at the level")
    (line,) = log.lines()
    assert json.loads(line)["message"] == "at the level"


def test_uvicorn_logs_warnings_only_and_no_access_lines(log: Log) -> None:
    log.configure("json", "info")
    logging.getLogger("uvicorn.access").info("GET / 200")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("something is wrong", extra={"color_message": "in colours"})
    (line,) = log.lines()
    assert json.loads(line)["message"] == "something is wrong"
    assert "colours" not in line


def raise_at(depth: int) -> None:
    """Recurses with two functions alternately, so that Python does not abbreviate the traceback."""

    def even(left: int) -> None:
        odd(left - 1) if left else int("x")

    def odd(left: int) -> None:
        even(left - 1) if left else int("x")

    even(depth)


def logged_exception(log: Log, fail: Callable[[], object]) -> str:
    log.configure("json", "info")
    try:
        fail()
    except Exception:
        logging.getLogger("x").exception("it failed")
    (line,) = log.lines()
    text: str = json.loads(line)["exception"]
    return text


@pytest.mark.parametrize("depth", [100, 800])
def test_long_traceback_shows_the_innermost_frames(log: Log, depth: int) -> None:
    text = logged_exception(log, lambda: raise_at(depth))
    assert text.count("in even") + text.count("in odd") == 30
    assert f"{depth + 4 - 30} frames omitted" in text
    assert text.endswith("ValueError: invalid literal for int() with base 10: 'x'")


def test_causes_are_printed_before_the_exception_and_the_oldest_are_omitted(log: Log) -> None:
    def fail(number: int = 20) -> None:
        try:
            if number:
                fail(number - 1)
        finally:
            raise KeyError(number)

    text = logged_exception(log, fail)
    assert text.count("During handling of the above exception") == MAX_EXCEPTIONS - 1
    assert text.startswith("Further exceptions omitted.")
    assert text.index("KeyError: 19") < text.index("KeyError: 20")
    assert text.endswith("KeyError: 20")


def test_cause_notes_and_members_of_an_exception_group_are_printed(log: Log) -> None:
    def fail() -> None:
        error = ExceptionGroup("several", [ValueError("one"), TypeError("two")])
        error.add_note("a note")
        raise error from OSError("the cause")

    text = logged_exception(log, fail)
    assert all(part in text for part in ("ValueError: one", "TypeError: two", "OSError: the cause"))
    assert text.endswith("ExceptionGroup: several (2 sub-exceptions)\na note")


def test_middle_of_a_long_text_is_omitted(log: Log) -> None:
    log.configure("json", "info")
    logging.getLogger("x").info("a" * 10**6 + "end", extra={"long": "\0" * 10**6})
    (line,) = log.lines()
    message = json.loads(line)["message"]
    assert message.startswith("aaa")
    assert f"... {10**6 + 3 - MAX_TEXT} characters omitted ..." in message
    assert message.endswith("end")
    assert len(line) < 10 * MAX_TEXT


def test_long_exception_text_is_shortened(log: Log) -> None:
    def fail() -> None:
        raise ValueError("\N{SNOWMAN}" * 10**6)

    assert len(logged_exception(log, fail)) < MAX_TRACEBACK + 100


class Unprintable:
    def __repr__(self) -> str:
        raise ArithmeticError("no text")

    __str__ = __repr__


@pytest.mark.parametrize(
    ("message", "arguments", "extra"),
    [
        ("%d", ("seven",), {}),
        ("%s", (Unprintable(),), {}),
        ("%s %s", ("one",), {}),
        (Unprintable(), (), {}),
        ("a", (), {"thing": Unprintable()}),
        ("a", (), {"number": 10**5000}),
        ("a", (), {"many": list(range(MAX_LINE))}),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_record_that_cannot_be_formatted_is_replaced_by_one_line(
    log: Log, log_format: str, message: Any, arguments: tuple[Any, ...], extra: dict[str, Any]
) -> None:
    log.configure(log_format, "info")
    logging.getLogger("x").info(message, *arguments, extra=extra)
    (line,) = log.lines()
    assert "Log record omitted" in line
    assert log_format == "console" or json.loads(line)["logger"] == "x"


def test_exception_whose_str_fails_and_record_without_exception_are_logged(log: Log) -> None:
    class Error(Exception):
        def __str__(self) -> str:
            raise ArithmeticError("no text")

    def fail() -> None:
        raise Error

    assert logged_exception(log, fail).endswith("Error: <str() of this exception raised an exception>")
    logging.getLogger("x").exception("outside of an except block")
    assert json.loads(log.lines()[-1])["message"] == "outside of an except block"


def test_control_characters_are_escaped_on_the_console(log: Log) -> None:
    log.configure("console", "info")
    logging.getLogger("x").info("a\x1b[2J\r\x9b", extra={"good": True, "outcome": "b\x1b"})
    (line,) = log.lines()
    assert "a\\x1b[2J\\x0d\\x9b" in line
    assert "good=true" in line
    assert line.isprintable()


def test_report_of_dropped_lines_has_the_format_of_the_log(log: Log) -> None:
    log.configure("json", "info")
    fields = json.loads(log._writer.describe_drop(12))
    assert fields.pop("time")
    assert fields == {"level": "warning", "logger": "unfog.log", "message": "Dropped log lines", "count": 12}


def test_text_printed_to_stderr_is_logged_line_by_line(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, name in ((sys, "stderr"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(target, name, getattr(target, name))
    log.configure("json", "info")
    try:
        capture_stderr(log.handler)
        stream = sys.stderr
        print("one\ntwo", end="", file=stream)
        thread = threading.Thread(target=lambda: print("other", file=stream))
        thread.start()
        thread.join()
        print(" goes on", file=stream)
        print("x" * (MAX_TEXT + 1), end="", file=stream)
        print("unfinished", end="", file=stream, flush=True)
        print("\n  \n", file=stream)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("a warning", stacklevel=1)
    finally:
        logging.captureWarnings(capture=False)
    lines = [json.loads(line) for line in log.lines()]
    assert [line["message"] for line in lines[:3]] == ["one", "other", "two goes on"]
    assert lines[3]["message"].startswith("xxx")
    assert lines[4]["message"] == "unfinished"
    assert {line["logger"] for line in lines[:5]} == {"stderr"}
    assert lines[5]["logger"] == "py.warnings"
    assert len(lines) == 6


def test_lines_are_flushed_at_a_normal_exit() -> None:
    program = """
import logging
from app.logs import configure_logging, start_log
configure_logging("json", "info", start_log())
for number in range(500):
    logging.info("%d", number)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == [str(n) for n in range(500)]


def test_only_access_log_lines_have_fields_that_the_console_omits() -> None:
    """An event with such a field would lose it on a terminal."""
    pattern = re.compile(r"log\.(?:debug|info|warning|error|critical)\((?:[^()]|\([^()]*\))*\)")
    omitted = [f'"{name}":' for name in logs._JSON_ONLY]
    for path in [*(ROOT / "app").rglob("*.py"), *(ROOT / "model").rglob("*.py")]:
        calls = pattern.findall(path.read_text())
        assert [call for call in calls if any(name in call for name in omitted)] == [], path
