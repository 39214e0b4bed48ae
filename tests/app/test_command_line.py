"""Tests of the command line, which has a flag for each setting."""

import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from app import __main__ as cli
from app.engine.interface import RunnerError
from app.server.server import GivenUpError, StartError
from app.settings import Settings, SettingsError, flag_of
from model.compiled.memory import MAX_PRIMITIVES


class FakeWriter:
    """Collects the lines instead of writing them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def put(self, text: str) -> None:
        self.lines.append(text)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[dict[str, str], bool]]:
    """Runs the command line. Returns (flags, compile_only) of each start."""
    starts: list[tuple[dict[str, str], bool]] = []

    def start(writer: object, flags: dict[str, str], *, compile_only: bool) -> int:
        starts.append((flags, compile_only))
        return 0

    monkeypatch.setattr(sys, "argv", ["app", *arguments])
    monkeypatch.setattr("app.logs.start_log", lambda: None)
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
def test_invalid_arguments_exit_with_status_2_before_the_start(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert arguments[0].rstrip("=") in capsys.readouterr().err


def test_error_about_an_unknown_flag_does_not_contain_its_value(
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
def test_flags_are_settings_and_compile_flag_without_a_value_only_compiles(
    arguments: list[str], flags: dict[str, str], compile_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(monkeypatch, *arguments) == [(flags, compile_only)]


def test_help_contains_the_flag_of_every_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, "--help")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "UNFOG_* variable" in shown
    for field, description in Settings.model_fields.items():
        assert flag_of(field) in shown
        assert description.description


def test_help_is_shown_without_the_imports_of_the_service() -> None:
    """The imports take seconds."""
    code = "import atexit, sys, app.__main__; atexit.register(lambda: print({'torch', 'fastapi'} & {*sys.modules}))"
    command = [sys.executable, "-c", f"{code}; app.__main__.main()", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown.startswith("usage: python -m app")
    assert shown.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("error", "status", "written", "logged"),
    [
        (SettingsError("a message"), 2, ["unfog: a message\n"], ""),
        (GivenUpError("a message"), 1, [], "a message"),
        (ZeroDivisionError("a bug"), 1, [], "ZeroDivisionError: a bug"),
        (KeyboardInterrupt(), 130, [], ""),
    ],
    ids=["settings", "engine given up", "bug", "interrupt"],
)
def test_each_kind_of_error_has_its_exit_status(
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "UNFOG_FAST_CHECKPOINT and UNFOG_CHECKPOINT differ"),
        ({"checkpoint": "a"}, "UNFOG_FAST_CHECKPOINT and --checkpoint differ"),
        ({"fast_checkpoint": "a"}, "--fast-checkpoint and UNFOG_CHECKPOINT differ"),
    ],
)
def test_error_names_the_flag_if_the_setting_was_a_flag(
    flags: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(flags: object) -> None:
        raise RunnerError("UNFOG_FAST_CHECKPOINT and UNFOG_CHECKPOINT differ")

    writer: Any = FakeWriter()
    monkeypatch.setattr(cli, "load_settings", fail)
    assert cli._run(writer, flags, compile_only=False) == 2
    assert writer.lines == [f"unfog: {message}\n"]


@pytest.mark.parametrize("error", [RunnerError("UNFOG_MODELS: a text"), SettingsError("--models: a text")])
@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--model", "cats=folder"], "--model"),
        (["--model=cats=folder"], "--model"),
        (["--models", "cats=folder"], "--models"),
        (["--models=dogs=other", "--model", "cats=folder"], "--models"),
    ],
)
def test_error_names_the_flag_for_one_model_only_if_no_other_was_used(
    error: Exception, arguments: list[str], flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(flags: object) -> None:
        raise error

    writer: Any = FakeWriter()
    monkeypatch.setattr(cli, "load_settings", fail)
    monkeypatch.setattr("sys.argv", ["app", *arguments])
    assert cli._run(writer, {"models": "cats=folder"}, compile_only=False) == 2
    assert writer.lines == [f"unfog: {flag}: a text\n"]


def test_error_about_a_variable_does_not_name_the_flag_of_the_same_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_API_KEYS", "")
    writer: Any = FakeWriter()
    assert cli._run(writer, {"api_keys": "k" * 20}, compile_only=False) == 2
    (line,) = writer.lines
    assert line.startswith("unfog: UNFOG_API_KEYS is empty")


def test_start_limits_the_cache_of_convolutions_before_the_application_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[str | None] = []
    writer: Any = FakeWriter()

    def create_app(settings: Settings) -> None:
        limits.append(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
        raise StartError("stop here")

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")  # so that pytest restores the variable
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: True)  # would change malloc in the process of the tests
    monkeypatch.setattr("app.main.create_app", create_app)
    monkeypatch.setattr("app.logs.configure_logging", lambda *_: None)
    monkeypatch.setattr("app.logs.capture_stderr", lambda _: None)
    assert cli._run(writer, {}, compile_only=False) == 2
    assert limits == [str(MAX_PRIMITIVES)]
