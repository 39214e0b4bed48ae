"""Tests of the log queue and its writing thread. tests/e2e/test_logs.py tests the whole process."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from app.log_writer import LINE_OVERHEAD_BYTES, LogWriter, make_nonblocking

WAIT_SECONDS = 30.0
MAX_QUEUED_BYTES = 300_000  # a pipe holds less than half of this


class Pipe:
    """A pipe with a LogWriter. Collects the bytes that were read."""

    def __init__(self) -> None:
        self.reader, self._descriptor = os.pipe()
        self.writer = LogWriter(self._descriptor, MAX_QUEUED_BYTES)
        self._read = b""

    def read_until(self, end: str) -> list[str]:
        """Reads up to the line `end`. Returns all lines that were read since the start."""
        while f"\n{end}\n".encode() not in b"\n" + self._read:
            piece = os.read(self.reader, 65536)
            assert piece
            self._read += piece
        return self._read.decode().splitlines()

    def fill(self) -> None:
        """Writes until the pipe and the queue are full and a line is dropped."""
        line = "x" * 999
        while not self.writer.num_dropped:
            self.writer.put(f"{line}\n")

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        if self.reader >= 0:
            self.close_reader()  # makes a blocked write of the thread fail
        self.writer.flush(WAIT_SECONDS)
        self.writer = LogWriter(os.open(os.devnull, os.O_WRONLY))


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def reports(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.endswith("log lines were dropped")]


def test_lines_are_written_in_order(pipe: Pipe) -> None:
    for number in range(1000):
        pipe.writer.put(f"{number}\n")
    assert pipe.read_until("999") == [str(number) for number in range(1000)]
    assert pipe.writer.num_dropped == 0


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which each later write adds its number of bytes."""
    sizes, write = list[int](), os.write

    def count(descriptor: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(descriptor, data)

    monkeypatch.setattr("os.write", count)
    return sizes


def test_lines_that_arrive_together_are_written_together(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_writes(monkeypatch)
    with pipe.writer._condition:  # The thread takes the lines after the last one.
        for number in range(100):
            pipe.writer.put(f"{number:0>999}\n")
    assert pipe.read_until(f"{99:0>999}") == [f"{number:0>999}" for number in range(100)]
    assert sizes == [65_000, 35_000]  # MAX_WRITE_BYTES is 65,536


def test_only_the_line_that_cannot_be_written_is_lost(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write, num_calls = os.write, 0

    def fail_in_the_second_line(descriptor: int, data: bytes) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:9] if num_calls == 1 else data)

    monkeypatch.setattr("os.write", fail_in_the_second_line)
    with pipe.writer._condition:
        for line in ("first", "second", "third"):
            pipe.writer.put(f"{line}\n")
    report = "unfog: 1 log lines were dropped"
    assert pipe.read_until(report) == ["first", "sec", "third", report]
    assert pipe.writer.num_dropped == 1


def test_lines_of_several_threads_do_not_mix(pipe: Pipe) -> None:
    def put(letter: str) -> None:
        for _ in range(50):
            pipe.writer.put(letter * 9000 + "\n")  # more than PIPE_BUF, so that a write is not atomic

    threads = [threading.Thread(target=put, args=(letter,)) for letter in "abcd"]
    collected: list[str] = []

    def read() -> None:
        collected.extend(pipe.read_until("end"))

    reading = threading.Thread(target=read)
    for thread in [*threads, reading]:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    pipe.writer.flush(WAIT_SECONDS)
    pipe.writer.put("end\n")
    reading.join(WAIT_SECONDS)
    whole = [line for line in collected if len(line) == 9000]
    assert len(whole) + pipe.writer.num_dropped == 200
    assert all(len(set(line)) == 1 for line in whole)


def test_put_counts_dropped_lines_while_the_pipe_is_full(pipe: Pipe) -> None:
    pipe.fill()
    before = pipe.writer.num_dropped
    for _ in range(10_000):
        pipe.writer.put("y\n")
    assert pipe.writer.num_dropped == before + 10_000


def test_queue_of_short_lines_is_bounded_in_bytes(pipe: Pipe) -> None:
    pipe.fill()
    pipe.read_until("x" * 999)
    for _ in range(100_000):
        pipe.writer.put("\n")
    queued = pipe.writer._queue
    assert sum(len(line) + LINE_OVERHEAD_BYTES for line, _ in queued) <= MAX_QUEUED_BYTES
    assert len(queued) <= MAX_QUEUED_BYTES / LINE_OVERHEAD_BYTES


def test_line_longer_than_the_queue_is_dropped(pipe: Pipe) -> None:
    pipe.writer.put("x" * MAX_QUEUED_BYTES + "\n")
    pipe.writer.put("next\n")
    assert pipe.read_until("next")[0] == "unfog: 1 log lines were dropped"


def test_dropped_lines_are_reported_before_the_next_line(pipe: Pipe) -> None:
    pipe.fill()
    for _ in range(9):
        pipe.writer.put("dropped\n")
    reader = threading.Thread(target=pipe.read_until, args=("unfog: 10 log lines were dropped",))
    reader.start()
    reader.join(WAIT_SECONDS)  # the drops are reported although no further line is logged
    assert not reader.is_alive()
    pipe.writer.put("next\n")
    lines = pipe.read_until("next")
    assert reports(lines) == [10]
    assert lines[-2:] == ["unfog: 10 log lines were dropped", "next"]
    assert "dropped" not in lines


def test_slow_reader_gets_one_report_until_half_of_the_queue_is_free(pipe: Pipe) -> None:
    pipe.fill()
    for _ in range(8):
        assert os.read(pipe.reader, 8192)
        for _ in range(10):
            pipe.writer.put("x" * 999 + "\n")
    dropped = pipe.writer.num_dropped
    reader = threading.Thread(target=pipe.read_until, args=("end",))
    reader.start()
    pipe.writer.flush(WAIT_SECONDS)
    pipe.writer.put("end\n")
    reader.join(WAIT_SECONDS)
    assert reports(pipe.read_until("end")) == [dropped]


def test_each_line_is_tried_once_after_the_reader_closed_the_pipe(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_writes(monkeypatch)
    pipe.close_reader()
    for _ in range(20):
        pipe.writer.put("lost\n")
    pipe.writer.flush(WAIT_SECONDS)
    assert (len(sizes), pipe.writer.num_dropped) == (20, 20)


def test_write_errors_are_reported_after_the_next_successful_write(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    left = [3]

    def fail_in_the_middle(descriptor: int, data: bytes) -> int:
        if left[0] == 3:
            left[0] -= 1
            return write(descriptor, data[:4])
        if left[0] > 0:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr("os.write", fail_in_the_middle)
    for _ in range(2):
        pipe.writer.put("torn and lost\n")
    pipe.writer.flush(WAIT_SECONDS)
    pipe.writer.put("whole\n")
    lines = pipe.read_until("unfog: 2 log lines were dropped")
    assert lines == ["torn", "whole", "unfog: 2 log lines were dropped"]
    assert pipe.writer.num_dropped == 2


def test_flush_writes_all_lines_while_the_pipe_is_read(pipe: Pipe) -> None:
    lines = [f"{number:0>999}\n" for number in range(80)]  # fits into the queue, but not into the pipe

    def read() -> None:
        with suppress(OSError):
            pipe.read_until(lines[-1].rstrip())

    reader = threading.Thread(target=read)
    for line in lines:
        pipe.writer.put(line)
    reader.start()
    pipe.writer.flush(WAIT_SECONDS)
    assert not pipe.writer._queue
    assert pipe.writer.num_dropped == 0
    reader.join(WAIT_SECONDS)


def test_flush_returns_if_the_pipe_is_not_read(pipe: Pipe) -> None:
    pipe.fill()
    flushing = threading.Thread(target=pipe.writer.flush, args=(1000 * WAIT_SECONDS,))
    flushing.start()
    flushing.join(WAIT_SECONDS)
    assert not flushing.is_alive()
    assert pipe.writer._queue


def test_lines_are_written_completely_to_a_nonblocking_descriptor(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer.descriptor, False)
    lines = [f"{number:0>999}" for number in range(80)]
    for line in lines:
        pipe.writer.put(f"{line}\n")
    assert pipe.read_until(lines[-1]) == lines


def test_lone_surrogates_are_escaped(pipe: Pipe) -> None:
    pipe.writer.put("\ud800\n")
    assert pipe.read_until("\\ud800")


def test_make_nonblocking_affects_only_this_descriptor_of_a_pipe() -> None:
    reader, writer = os.pipe()
    own = os.dup(writer)
    make_nonblocking(own)
    with suppress(BlockingIOError):
        while True:
            os.write(own, b"x" * 4096)
    assert os.get_blocking(writer)
    assert not os.get_blocking(own)
    for descriptor in (reader, writer, own):
        os.close(descriptor)


def test_make_nonblocking_ignores_files_and_closed_descriptors(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"before\n")
    make_nonblocking(descriptor)
    os.write(descriptor, b"after\n")
    os.close(descriptor)
    assert (tmp_path / "log").read_bytes() == b"before\nafter\n"
    make_nonblocking(descriptor)
