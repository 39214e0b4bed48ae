"""What the command line takes: nearly nothing, as variables configure the service."""

import sys

import pytest

from app import cli


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
