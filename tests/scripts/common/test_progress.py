import os
import signal
import sys
from types import SimpleNamespace

import pytest

from scripts.common import progress
from scripts.common.progress import Reporter
from tests.scripts.extras import hide


@pytest.mark.parametrize("is_terminal", [True, False])
def test_without_rich_progress_is_shown_as_lines(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide("rich", monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0)
    with Reporter() as reporter, reporter.task("drawing", 4, "steps") as task:
        reporter.line("begun")
        task.advance(1, "loss 2")
    begun, line = capsys.readouterr().out.splitlines()
    assert begun == "begun"
    assert line.startswith("drawing 1/4 loss 2 ")


def test_resumed_task_shows_what_was_done_earlier_and_estimates_from_what_was_done_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 10.0])
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    with Reporter() as reporter, reporter.task("epoch 1/1", 100, "images", done=60) as task:
        task.advance(20)
    assert capsys.readouterr().out == "epoch 1/1 80/100 2 images/s, 10 s left\n"


def test_terminal_with_rich_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0)
    with Reporter() as reporter, reporter.task("drawing", 4, "steps") as task:
        task.advance(1)
    shown = capsys.readouterr().out
    assert "drawing" in shown and "/4" in shown
    assert "s left" not in shown


def test_long_line_on_a_terminal_is_not_broken_or_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = f"serve it: scripts/serve --model flowers={'a-long-folder/' * 10}[red]:cat:.safetensors"
    with Reporter() as reporter:
        reporter.line(line)
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_stops_the_script_with_its_message(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)  # nohup ignores SIGHUP
    try:
        with pytest.raises(SystemExit) as exit_, Reporter(lambda: "run it again"):
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is default
    finally:
        signal.signal(number, before)
    assert exit_.value.code == status
    assert capsys.readouterr().err.strip() == "run it again"
