import json
import logging
from collections.abc import Iterator

import pytest

from app.logs import configure_logging


@pytest.fixture(autouse=True)
def others_logging_is_left_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers, root.level = handlers, level
    logging.getLogger("uvicorn").setLevel(logging.NOTSET)
    logging.getLogger("uvicorn.access").disabled = False


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_json_line_has_its_facts_as_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    logging.getLogger("unfog.x").warning("%d of %d", 1, 2, extra={"request_id": "an-id", "seconds": 0.5})
    (line,) = lines(capsys)
    fields = json.loads(line)
    assert list(fields)[:4] == ["time", "level", "logger", "message"]  # what every line has comes first
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "warning",
        "logger": "unfog.x",
        "message": "1 of 2",
        "request_id": "an-id",
        "seconds": 0.5,
    }


def test_what_cannot_be_json_is_still_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    logging.getLogger("x").info("a\nb \ud800 \x1b[31m", extra={"thing": object()})
    (line,) = lines(capsys)
    assert json.loads(line)["message"].startswith("a\nb ")


def test_an_exception_is_a_field_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    try:
        raise ArithmeticError("too much")
    except ArithmeticError:
        logging.getLogger("x").exception("it failed")
    (line,) = lines(capsys)
    assert json.loads(line)["exception"].endswith("ArithmeticError: too much")


def test_the_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("console", "info")
    logging.getLogger("unfog.access").info("POST /generate", extra={"status": 200, "digit": 7, "sampler": "ddpm"})
    (line,) = lines(capsys)
    assert "info" in line
    assert "POST /generate" in line
    assert "status=200" in line
    assert "digit=7" in line
    assert "sampler" not in line  # that is for whoever searches
    assert "\x1b" not in line  # no colours but on a terminal


def test_auto_is_json_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("auto", "warning")
    logging.getLogger("x").info("not said")
    logging.getLogger("x").warning("said")
    (line,) = lines(capsys)
    assert json.loads(line)["message"] == "said"


def test_uvicorn_says_nothing_that_we_say(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    logging.getLogger("uvicorn.access").info("GET / 200")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("something is wrong", extra={"color_message": "in colours"})
    (line,) = lines(capsys)
    assert json.loads(line)["message"] == "something is wrong"
    assert "colours" not in line
