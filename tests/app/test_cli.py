"""Tests of the command line, which has a flag for each setting."""

import logging
import sys
from typing import Any

import pytest

from app import cli
from app.server.server import GivenUpError
from app.settings import Settings, SettingsError, flag_of


class FakeWriter:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def put(self, text: str) -> None:
        self.lines.append(text)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[dict[str, str], bool]]:
    """Runs the command with these arguments. Returns the flags of each start, and True if it only compiles."""
    starts: list[tuple[dict[str, str], bool]] = []

    def start(writer: object, flags: dict[str, str], *, compile_only: bool) -> int:
        starts.append((flags, compile_only))
        return 0

    monkeypatch.setattr(sys, "argv", ["app", *arguments])
    monkeypatch.setattr(cli, "start_log", lambda: None)
    monkeypatch.setattr(cli, "_run", start)
    monkeypatch.setattr(cli, "_leave", lambda status, writer: None)
    cli.main()
    return starts


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["--open"],
        ["--max-batch"],
        ["--max-batch="],
        ["--api-keys", ""],
        ["--openapi", "--compile"],
        ["--openapi", "--port", "3"],
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert arguments[0].rstrip("=") in capsys.readouterr().err


def test_the_value_of_a_mistyped_flag_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--api-key", "secret-1", "--api-key=secret-2")
    shown = capsys.readouterr().err
    assert "--api-key" in shown
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("arguments", "flags", "compile_only"),
    [
        ([], {}, False),
        (["--max-batch", "8"], {"max_batch": "8"}, False),
        (["--max-batch=8", "--port=9000"], {"max_batch": "8", "port": "9000"}, False),
        (["--compile", "off"], {"compile": "off"}, False),
        (["--compile"], {}, True),
        (["--compile", "--cache-dir", "/c"], {"cache_dir": "/c"}, True),
    ],
)
def test_flags_are_settings_and_compile_without_a_value_only_compiles(
    arguments: list[str], flags: dict[str, str], compile_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(monkeypatch, *arguments) == [(flags, compile_only)]


def test_help_lists_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, "--help")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "UNFOG_* variable" in shown
    for field, description in Settings.model_fields.items():
        assert flag_of(field) in shown
        assert description.description


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
    def fail(flags: object) -> None:
        raise error

    writer: Any = FakeWriter()
    monkeypatch.setattr(cli, "load_settings", fail)
    assert cli._run(writer, {}, compile_only=False) == status
    assert writer.lines == written
    assert logged in caplog.text
    assert bool(caplog.records) is bool(logged)
    assert all(record.levelno == logging.CRITICAL for record in caplog.records)
