"""Tests the parts of scripts.training.processes that need no second process, or only a store."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scripts import distil, train
from scripts.common.errors import ScriptError
from scripts.training import processes
from scripts.training.loop import _check_batch, choose_device
from scripts.training.processes import ALONE, QUEUE, Processes, processes_of_environment
from tests.scripts.tiny_training import noise_data, recipe_of

VARIABLES = {
    "WORLD_SIZE": "6",
    "RANK": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 128, 500])
def test_shares_cover_each_row_once_and_differ_by_at_most_one(num_rows: int, count: int) -> None:
    shares = [list(range(num_rows))[Processes(count, rank).share(num_rows)] for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.usefixtures("torchrun")
def test_variables_of_torchrun_describe_the_processes() -> None:
    assert processes_of_environment() == Processes(count=6, rank=4, local_rank=1, local_count=3)


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_needs_no_variables(monkeypatch: pytest.MonkeyPatch, world_size: str | None) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert processes_of_environment() == ALONE


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize(
    ("name", "value"), [*((name, None) for name in VARIABLES if name != "WORLD_SIZE"), ("WORLD_SIZE", "many")]
)
def test_incomplete_variables_give_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, value: str | None
) -> None:
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        train.main([f"--out={tmp_path}"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not all variables of torchrun are set. Start several processes with torchrun, or unset WORLD_SIZE" in line


@pytest.mark.usefixtures("torchrun")
def test_distillation_refuses_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        distil.main([f"--out={tmp_path / 'run'}"])
    assert exit_.value.code == 2
    assert "distil: distillation runs in a single process. Start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "expected"), [(0, "progress\n"), (1, "")])
def test_only_the_first_process_prints(rank: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Processes(2, rank).quiet():
        print("progress")
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("cores", "limit", "local_count", "expected"), [(8, None, 4, 2), (8, 3.5, 2, 2), (2, None, 4, 1), (7, None, 2, 3)]
)
def test_processes_of_a_host_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, limit: float | None, local_count: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(processes, "granted_cores", lambda: limit)
    assert Processes(8, local_count=local_count).default_threads == expected
    assert ALONE.default_threads is None


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_host_has_a_gpu_of_its_own(name: str) -> None:
    assert choose_device(name, Processes(4, 3, local_rank=1, local_count=2)) == torch.device("cuda", 1)
    assert choose_device("cpu", Processes(4, 3, local_rank=1, local_count=2)) == torch.device("cpu")
    assert choose_device(name) == torch.device("cuda")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "local_count", "message"),
    [
        ("cuda:1", 2, "--device cuda:1: with torchrun, each process has a GPU of its own. Use --device cuda"),
        ("cuda", 3, "torchrun has started 3 processes on a host with 2 GPUs. Use --nproc-per-node 2, or --device cpu"),
    ],
)
def test_gpu_that_a_process_cannot_have_is_refused(name: str, local_count: int, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        choose_device(name, Processes(3, local_count=local_count))


def test_more_processes_than_images_in_a_batch_are_refused() -> None:
    recipe, data = recipe_of("plateau"), noise_data()
    _check_batch(recipe, data, Processes(8))
    with pytest.raises(ScriptError, match="batch_size is 8, so at most 8 processes can train"):
        _check_batch(recipe, data, Processes(9))


def test_process_with_other_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "from_first", lambda self, value: {"data": "a"})
    Processes(2, 1).check_equal({"data": "a"}, "data")
    with pytest.raises(ScriptError, match="has another data than the host of the first process"):
        Processes(2, 1).check_equal({"data": "b"}, "data")


@pytest.mark.parametrize(("rank", "local_rank", "waits_before"), [(0, 0, 0), (2, 0, 1), (1, 1, 2), (3, 1, 2)])
def test_first_process_loads_before_those_of_other_hosts_and_these_before_the_others(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, waits_before: int
) -> None:
    events = list[str]()
    monkeypatch.setattr(dist, "barrier", lambda: events.append("wait"))
    Processes(4, rank, local_rank, 2).in_turn(lambda: events.append("load"))
    assert events == ["wait"] * waits_before + ["load"] + ["wait"] * (3 - waits_before)


@pytest.mark.parametrize(("count", "local_rank", "is_removed"), [(1, 0, False), (2, 0, True), (2, 1, False)])
def test_first_process_of_a_host_removes_libraries_that_a_killed_compiler_left_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, local_rank: int, is_removed: bool
) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    (tmp_path / "ab").mkdir()
    empty, whole, other = (tmp_path / "ab" / name for name in ("empty.main.so", "whole.main.so", "empty.lock"))
    empty.touch()
    whole.write_bytes(b"library")
    other.touch()
    Processes(count, local_rank=local_rank).remove_unfinished(tmp_path)
    assert empty.exists() is not is_removed
    assert whole.exists() and other.exists()


def test_processes_agree_on_a_new_prefix_in_a_store_with_entries_of_ended_ones() -> None:
    """Ended processes have left requests, a confirmation, and an answer that nobody has read."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    server.queue_push(QUEUE, "1,ended,")
    server.queue_push(QUEUE, "2,ended too,old prefix")
    server.set("ended", "old prefix")

    def prefix_of(rank: int) -> str:
        client = dist.TCPStore("localhost", server.port, is_master=False, timeout=timedelta(seconds=20))
        return Processes(3, rank)._new_prefix(client)

    rounds = []
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            rounds.append(set(pool.map(prefix_of, range(3))))
    (first,), (second,) = rounds
    assert len({first, second, "old prefix"}) == 3


def test_sum_of_a_single_process_changes_nothing() -> None:
    tensors = [torch.tensor([1.0, math.pi])]
    ALONE.add_up(tensors)
    ALONE.copy_from_first(tensors)
    assert tensors[0].tolist() == torch.tensor([1.0, math.pi]).tolist()
    assert ALONE.from_first("value") == "value"
