import asyncio
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from app.batches.records import Line as BatchLine
from app.batches.records import LineAnswer
from scripts import run_batch
from scripts.common.progress import Reporter
from tests.e2e.batch_client import FEW_STEPS, GENERATIONS, Line, drawings, jsonl, line, png_of
from tests.e2e.conftest import start_service
from tests.e2e.faulty_service import FaultyRunner, fault_seed
from tests.e2e.process import BASE, TIMEOUT, wait_until
from tests.e2e.service import Service, pngs
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

SETTINGS = {**{name: value for name, value in BASE.items() if name.startswith("UNFOG_")}, "UNFOG_MAX_BATCH": "64"}
LINE = line("a", {"prompt": "7"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors")


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_BATCH="64")


@pytest.fixture(autouse=True)
def settings(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SETTINGS, "UNFOG_CHECKPOINT": str(checkpoint)}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Returns the paths of the input, which has 40 lines, and of the output, which does not exist."""
    (tmp_path / "in.jsonl").write_bytes(jsonl(drawings(40)))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(source: Path, output: Path) -> int:
    """Returns the exit status."""
    try:
        run_batch.main(["-i", str(source), "-o", str(output)])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def start(source: Path, output: Path) -> subprocess.Popen[str]:
    # A shell starts a background command with SIGINT ignored, and the processes of its tests inherit this.
    code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "runpy.run_module('scripts.run_batch', run_name='__main__')"
    command = [sys.executable, "-c", code, "-i", str(source), "-o", str(output)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def answers_in(output: Path) -> dict[str, Line]:
    """Returns the answers by custom_id. Each of them must occur once."""
    answers = [json.loads(each) for each in output.read_bytes().splitlines()]
    by_id = {answer["custom_id"]: answer for answer in answers}
    assert len(by_id) == len(answers)
    return by_id


def lasting(answers: dict[str, Line]) -> dict[str, Any]:
    """Returns what is the same each time that the lines are answered."""
    return {name: (each["id"], each["response"]["status_code"], png_of(each)) for name, each in answers.items()}


def num_lines(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def error_in(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the message of a script that cannot continue, which is one line."""
    out, err = capsys.readouterr()
    assert not out
    (message,) = err.splitlines()
    assert isinstance(message, str) and message.startswith("run_batch: ")
    return message


def test_all_lines_are_answered_with_the_images_of_the_service(
    files: tuple[Path, Path], service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    assert run(source, output) == 0
    assert "40 lines answered, 0 of them failed" in capsys.readouterr().out
    answers, lines = answers_in(output), drawings(40)
    assert answers.keys() == {each["custom_id"] for each in lines}
    for each in lines[:10]:
        answer, body = answers[each["custom_id"]], each["body"]
        seed = answer["response"]["body"]["seed"]
        assert seed == body.get("seed", seed)
        assert (answer["response"]["status_code"], answer["error"]) == (200, None)
        expected = service.client.post(GENERATIONS, json={**body, "seed": seed}).json()
        assert answer["response"]["body"]["data"] == expected["data"]


def test_seed_of_a_line_follows_from_the_content_of_the_input(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = files
    other, copy = tmp_path / "other.jsonl", tmp_path / "copy.jsonl"
    copy.write_bytes(source.read_bytes())
    other.write_bytes(source.read_bytes() + b"\n")
    seeds = []
    for each in (source, copy, other):
        assert run(each, each.with_suffix(".out")) == 0
        answers = answers_in(each.with_suffix(".out"))
        seeds.append([answers[f"line-{number}"]["response"]["body"]["seed"] for number in (0, 4, 8)])
    assert seeds[0] == seeds[1]
    assert not set(seeds[0]) & set(seeds[2])
    assert not output.exists()


def test_lines_of_an_own_route_are_answered(files: tuple[Path, Path], service: Service) -> None:
    source, output = files
    body = {"digit": 3, "seed": 1, "count": 2}
    source.write_bytes(jsonl([line("a", body, "/generate")]))
    assert run(source, output) == 0
    assert png_of(answers_in(output)["a"]) == pngs(service.post(body))


def test_killed_run_continues_with_the_missing_lines_and_the_same_images(tmp_path: Path) -> None:
    source, output, unbroken = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "unbroken.jsonl"))
    source.write_bytes(jsonl(drawings(300)))
    process = start(source, output)
    with process:
        wait_until(lambda: num_lines(output) >= 20, "some lines are answered")
        process.kill()
    before = output.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    assert 20 <= num_lines(output) < 300
    assert run(source, output) == 0
    assert output.read_bytes().startswith(kept)
    assert run(source, unbroken) == 0
    assert lasting(answers_in(output)) == lasting(answers_in(unbroken))
    assert len(answers_in(output)) == 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_with_a_message_that_says_how_to_continue(tmp_path: Path, number: signal.Signals) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(drawings(2000)))
    with start(source, output) as process:
        wait_until(lambda: num_lines(output) >= 20, "some lines are answered")
        process.send_signal(number)
        assert process.stderr
        message = process.stderr.read()
        assert process.wait(TIMEOUT) == 128 + number
    assert message.count("Start it again with the same arguments") == 1
    assert "Traceback" not in message
    assert 20 <= num_lines(output) < 2000


def test_incomplete_last_line_is_removed(files: tuple[Path, Path]) -> None:
    source, output = files
    assert run(source, output) == 0
    complete, expected = output.read_bytes().splitlines(keepends=True), lasting(answers_in(output))
    for end in (complete[10][:100], complete[10][:-1]):
        output.write_bytes(b"".join(complete[:10]) + end)
        assert run(source, output) == 0
        assert output.read_bytes().startswith(b"".join(complete[:10]))
        assert lasting(answers_in(output)) == expected


def test_complete_output_is_not_changed(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = files
    assert run(source, output) == 0
    before = output.read_bytes()
    monkeypatch.setenv("UNFOG_CHECKPOINT", "/no/such/checkpoint")  # No model is needed.
    assert run(source, output) == 0
    assert output.read_bytes() == before


def test_output_of_another_input_is_refused(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, output = files
    assert run(source, output) == 0
    before = output.read_bytes()
    source.write_bytes(jsonl(drawings(39)))
    capsys.readouterr()
    assert run(source, output) == 2
    assert error_in(capsys) == (
        f"run_batch: {output} has answers to the lines of another file. Use another file for -o"
    )
    assert output.read_bytes() == before


@pytest.mark.parametrize("content", [b"any text\n", b"[]\n", b'{"id": 1}\n', b"\xff\xff\n", jsonl(drawings(2))])
def test_file_that_is_no_output_is_refused_and_not_changed(
    files: tuple[Path, Path], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    output.write_bytes(content)
    assert run(source, output) == 2
    assert str(output) in error_in(capsys)
    assert output.read_bytes() == content


def test_text_without_a_newline_that_is_no_output_is_not_removed(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    output.write_bytes(b"the only copy of a text")
    assert run(source, output) == 2
    assert str(output) in error_in(capsys)
    assert output.read_bytes() == b"the only copy of a text"


def test_second_run_with_the_same_output_is_refused(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    with output.open("ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert run(source, output) == 2
    assert error_in(capsys) == f"run_batch: {output} is being written by another process. Use another file for -o"
    assert output.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (jsonl([LINE]) + b"\nno JSON\n", ", line 3: The line is not valid JSON"),
        (jsonl([LINE, LINE]), ", line 2: Another line has the custom_id 'a'"),
        (jsonl([{**LINE, "more": 1}]), ", line 1: Unknown field 'more'"),
        (jsonl([{**LINE, "url": "/v1/embeddings"}]), ", line 1: The url must be"),
        (jsonl([LINE, {**LINE, "custom_id": "b", "url": "/generate"}]), ", line 2: The url must be"),
        (b"", ": The file has no lines"),
        (b"\n\n", ": The file has no lines"),
    ],
)
def test_invalid_input_is_refused_with_its_file_and_line(
    files: tuple[Path, Path], content: bytes, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    source.write_bytes(content)
    assert run(source, output) == 2
    assert error_in(capsys).startswith(f"run_batch: {source}{place}")
    assert not output.exists()


@pytest.mark.timeout(60)  # It would wait for a writer of the named pipe.
def test_input_that_can_be_read_only_once_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, named = tmp_path / "out.jsonl", tmp_path / "named"
    os.mkfifo(named)
    reading, writing = os.pipe()
    os.write(writing, jsonl(drawings(40)))
    os.close(writing)
    try:
        for source in (Path(f"/dev/fd/{reading}"), named, tmp_path):
            assert run(source, output) == 2
            expected = f"run_batch: {source} is not a regular file. Write the lines to a file first"
            assert error_in(capsys) == expected
    finally:
        os.close(reading)
    assert not output.exists()


@pytest.mark.parametrize(
    "lines",
    [
        [*drawings(40)[:20], line("line-20", {"prompt": "9", **FEW_STEPS}), *drawings(40)[21:]],
        [*drawings(40)[:20], *drawings(40)[21:]],
        [*drawings(40)[:39], {**LINE, "url": "/generate"}],
        drawings(39),
        drawings(41),
        [],
    ],
    ids=["other line", "missing line", "invalid line", "shorter", "longer", "empty"],
)
def test_input_that_changes_after_its_check_ends_the_script_and_no_changed_line_is_answered(
    files: tuple[Path, Path],
    lines: list[Line],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = files
    content, unbroken = source.read_bytes(), tmp_path / "unbroken.jsonl"

    def change_and_answer(*arguments: Any) -> Any:
        source.write_bytes(jsonl(lines))
        return answer_all(*arguments)

    answer_all = run_batch.answer_all
    with monkeypatch.context() as patch:
        patch.setattr(run_batch, "answer_all", change_and_answer)
        assert run(source, output) == 2
    out, err = capsys.readouterr()
    assert "answered" not in out
    assert err.splitlines()[-1] == (
        f"run_batch: {source} has changed while it was read. Restore it, or use another file for -o"
    )
    source.write_bytes(content)
    assert run(source, unbroken) == 0
    expected = lasting(answers_in(unbroken))
    assert lasting(answers_in(output)).items() <= expected.items()
    assert run(source, output) == 0
    assert lasting(answers_in(output)) == expected


def test_exit_status_is_1_if_a_line_has_failed_also_in_an_earlier_run(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    source.write_bytes(jsonl([*drawings(3), line("refused", {"prompt": "a cat"})]))
    for _ in range(2):
        assert run(source, output) == 1
        assert "4 lines answered, 1 of them failed" in capsys.readouterr().out
    answer = answers_in(output)["refused"]
    assert answer["response"]["status_code"] == 400
    assert answer["response"]["body"]["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("name", "value"),
    [("UNFOG_MAX_BATCH", "0"), ("UNFOG_CHECKPOINT", "/no/such/checkpoint"), ("UNFOG_DEVICE", "cuda:99")],
)
def test_invalid_setting_is_reported_in_one_line(
    files: tuple[Path, Path], name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert run(*files) == 2
    assert value in error_in(capsys)


def test_file_that_cannot_be_opened_is_reported_in_one_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = files
    for arguments in ((tmp_path / "missing.jsonl", tmp_path / "out.jsonl"), (source, tmp_path / "no folder" / "out")):
        assert run(*arguments) == 2
        assert "No such file or directory" in error_in(capsys)


def test_engine_that_fails_ends_the_script_with_one_line(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    lines = [*drawings(3), line("lost", {"prompt": "7", **FEW_STEPS, "seed": fault_seed("lost", 5)})]
    source.write_bytes(jsonl(lines))
    with monkeypatch.context() as patch:
        patch.setattr("app.runner.load.Runner", FaultyRunner)
        patch.setenv("UNFOG_GIVE_UP_SECONDS", "0.1")
        assert run(source, output) == 2
    assert "The engine has failed" in capsys.readouterr().err.splitlines()[-1]
    assert run(source, output) == 0
    assert answers_in(output).keys() == {each["custom_id"] for each in lines}


@pytest.mark.timeout(60)  # It would wait for the engine forever.
def test_engine_that_fails_ends_the_script_also_if_a_service_would_never_give_up(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    source.write_bytes(jsonl([line("lost", {"prompt": "7", **FEW_STEPS, "seed": fault_seed("lost", 5)})]))
    monkeypatch.setattr("app.runner.load.Runner", FaultyRunner)
    monkeypatch.setattr(run_batch, "GIVE_UP_SECONDS", 0.1)
    monkeypatch.setenv("UNFOG_GIVE_UP_SECONDS", "never")
    assert run(source, output) == 2
    assert "The engine has failed" in capsys.readouterr().err.splitlines()[-1]
    assert output.read_bytes() == b""


class Answers:
    """Answers lines after other tasks have run, and records the sizes of the lines that are in progress together."""

    def __init__(self) -> None:
        self.running, self.seen = list[int](), list[list[int]]()

    async def answer(self, asked: BatchLine) -> LineAnswer:
        self.running.append(len(asked.body))
        self.seen.append(self.running.copy())
        for _ in range(3):
            await asyncio.sleep(0)
        self.running.remove(len(asked.body))
        return LineAnswer(200, "request", b"{}", 1, 1)


def test_bytes_of_the_lines_in_progress_are_limited_and_a_line_beyond_the_limit_runs_alone(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = files
    most, largest = 1000, 2000
    monkeypatch.setattr(run_batch, "MOST_BYTES", most)
    sizes = [100] * 40 + [400] * 10 + [largest] + [600] * 3 + [most] + [100] * 5
    prompts = ["x" * (size - len('{"prompt":""}')) for size in sizes]
    source.write_bytes(jsonl(line(f"line-{i}", {"prompt": prompt}) for i, prompt in enumerate(prompts)))
    answers, app = Answers(), FastAPI()
    app.state.lines, app.state.service = answers, SimpleNamespace(engine=SimpleNamespace(full_step=lambda: 64))
    batch, answered = run_batch.read_batch(source), run_batch.Answered(set(), 0)
    with Reporter() as reporter, reporter.task("lines", len(sizes), "lines") as task, output.open("ab") as file:
        asyncio.run(run_batch.OfflineRun(app, batch, answered, file, task).run())
    assert len(answered.ids) == len(answers_in(output)) == len(sizes)
    assert [largest] in answers.seen
    assert all(sum(running) <= most or running == [largest] for running in answers.seen)
    assert {running.count(100) for running in answers.seen} >= {10}
    assert {running.count(400) for running in answers.seen} == {0, 1, 2}


def test_full_disk_ends_the_script_with_one_line_and_the_next_run_continues(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = files
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # bytes of a file
    try:
        assert run(source, output) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "File too large" in capsys.readouterr().err.splitlines()[-1]
    assert output.stat().st_size == 10_000
    assert run(source, output) == 0
    assert len(answers_in(output)) == 40


def test_files_and_batches_of_a_service_are_left_alone(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNFOG_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("UNFOG_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    assert run(*files) == 0
    assert not os.path.lexists(tmp_path / "data")
