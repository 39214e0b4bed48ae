"""Tests which errors the clients retry. The server in these tests has no service behind it."""

from pathlib import Path

import pytest

from tests.examples.programs import EXAMPLES, Failing, failing_server, run_program

CLIENTS = ["client.py", "client.mjs", "curl.sh"]


def run_against(failing: Failing, name: str, folder: Path) -> str:
    """Runs a client that must fail. Returns its output."""
    with failing_server(failing):
        done = run_program(EXAMPLES / name, failing.url, cwd=folder)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", CLIENTS)
def test_client_does_not_retry_an_invalid_request_and_shows_the_error(name: str, tmp_path: Path) -> None:
    failing = Failing(failures=[422], forever=True)
    assert "failed_on_purpose" in run_against(failing, name, tmp_path)
    assert failing.paths == ["/generate"]


def test_error_does_not_replace_a_file_of_an_earlier_run_of_curl(tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(b"earlier")
    run_against(Failing(failures=[422], forever=True), "curl.sh", tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("seven.png", b"earlier")]


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("status", [429, 503])
def test_client_gives_up_if_it_would_have_to_wait_too_long(name: str, status: int, tmp_path: Path) -> None:
    failing = Failing(failures=[status], forever=True, retry_after="3600")
    assert "failed_on_purpose" in run_against(failing, name, tmp_path)
    assert failing.paths == ["/generate"]


@pytest.mark.parametrize("name", ["client.py", "client.mjs"])
def test_client_gives_up_after_five_attempts_with_the_same_key(name: str, tmp_path: Path) -> None:
    failing = Failing(failures=[429], forever=True, retry_after="0")
    assert "failed_on_purpose" in run_against(failing, name, tmp_path)
    assert failing.paths == ["/generate"] * 5
    assert len(set(failing.keys)) == 1
