"""What the command line takes: nearly nothing, as variables configure the service."""

import logging
import sys
from typing import Any

import pytest

from app import cli
from app.server.server import GivenUpError
from app.settings import SettingsError


class FakeWriter:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def put(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("arguments", [["--port", "3"], ["serve"], ["--open"], ["--openapi", "--compile"]])
def test_what_it_does_not_take_is_said_and_starts_nothing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["app", *arguments])
    monkeypatch.setattr(cli, "load_settings", lambda: pytest.fail("it began to serve"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_help_says_what_configures_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["app", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "UNFOG_* variables" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "written", "logged"),
    [
        (SettingsError("a sentence"), 2, ["unfog: a sentence\n"], ""),
        (GivenUpError("a sentence"), 1, [], "a sentence"),
        (ZeroDivisionError("a bug"), 1, [], "ZeroDivisionError: a bug"),
        (KeyboardInterrupt(), 130, [], ""),
    ],
    ids=["settings", "given up", "bug", "interrupt"],
)
def test_exit_status_of_each_kind_of_error(
    error: BaseException,
    status: int,
    written: list[str],
    logged: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise error

    writer: Any = FakeWriter()
    monkeypatch.setattr(cli, "load_settings", fail)
    assert cli._run(writer, compile_only=False) == status
    assert writer.lines == written
    assert logged in caplog.text
    assert bool(caplog.records) is bool(logged)
    assert all(record.levelno == logging.CRITICAL for record in caplog.records)
