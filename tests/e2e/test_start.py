"""What stops the start: one sentence, status 2."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

from model.checkpoint import tensors_sha256
from tests.e2e.process import Process
from tests.e2e.service import Service


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def one_bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def a_pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00cposix\nsystem\n.")


def somebody_elses_tensors(path: Path) -> None:
    save_file({}, path)


def rewritten(path: Path, part: str, **fields: object) -> None:
    """Changes a part of the metadata, and the digest with it."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["unfog"])
    del metadata["digest"]
    metadata[part] |= fields
    metadata["digest"] = tensors_sha256(tensors, json.dumps(metadata, sort_keys=True).encode())
    save_torch_file(tensors, path, {"unfog": json.dumps(metadata)})


def a_size_that_overflows(path: Path) -> None:
    rewritten(path, "unet", time_dim=10**400)


def a_network_of_terabytes(path: Path) -> None:
    rewritten(path, "unet", num_pairs=10**9)


DAMAGES: tuple[Callable[[Path], None], ...] = (
    *(truncated, one_bit_flipped, a_pickle, somebody_elses_tensors),
    *(a_size_that_overflows, a_network_of_terabytes),
)
WRONG_SETTINGS = {
    "UNFOG_PORT": "eighty",
    "UNFOG_MAX_BATCH": "0",
    "UNFOG_REQUEST_TIMEOUT": "nan",
    "UNFOG_DEVICE": "cuda:99",
    "UNFOG_DTYPE": "float16",  # on a CPU
    "UNFOG_CHECKPOINT": "/nowhere/to/be/found.safetensors",
}
FAULTS = ("lifespan", "server")  # which tests.e2e.faulty knows


@pytest.fixture(scope="module")
def failed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """The exit status and stderr of every start that must fail; most of it is Python's own start, so two at a time."""
    folder = tmp_path_factory.mktemp("damaged")
    starts = {name: {name: value} for name, value in WRONG_SETTINGS.items()}
    starts |= {fault: {"module": "tests.e2e.faulty", "FAULT_AT_START": fault} for fault in FAULTS}
    for damage in DAMAGES:
        path = folder / f"{damage.__name__}.safetensors"
        shutil.copy(checkpoint, path)
        damage(path)
        starts[damage.__name__] = {"UNFOG_CHECKPOINT": str(path)}

    def run(variables: dict[str, str]) -> tuple[int, list[str]]:
        process = Process(**{"UNFOG_CHECKPOINT": str(checkpoint)} | variables)
        try:
            return process.wait(), process.lines
        finally:
            process.end()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(starts, pool.map(run, starts.values()), strict=True))


@pytest.mark.parametrize("start", [*WRONG_SETTINGS, *(damage.__name__ for damage in DAMAGES)])
def test_a_start_that_cannot_be_is_one_sentence_and_status_2(
    failed: dict[str, tuple[int, list[str]]], start: str
) -> None:
    status, lines = failed[start]
    assert status == 2
    assert 1 <= len(lines) <= 2, lines
    assert lines[-1].startswith("unfog: ")
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("fault", FAULTS)
def test_server_or_lifespan_that_fails_is_status_2_with_a_sentence_after_the_log(
    failed: dict[str, tuple[int, list[str]]], fault: str
) -> None:
    status, lines = failed[fault]
    assert status == 2
    assert lines[-1].startswith("unfog: the ")
    assert lines[-1].endswith(" failed to start, see the log")
    records = [json.loads(line) for line in lines[:-1]]
    assert any("can't start new thread" in record["message"] + record.get("exception", "") for record in records)


@pytest.mark.parametrize(
    "name", ["UNFOG_PORT", "UNFOG_MAX_BATCH", "UNFOG_REQUEST_TIMEOUT", "UNFOG_DEVICE", "UNFOG_DTYPE"]
)
def test_the_sentence_names_the_variable(failed: dict[str, tuple[int, list[str]]], name: str) -> None:
    assert f"{name}={WRONG_SETTINGS[name]}" in failed[name][1][-1].replace("'", "")


def test_device_that_cannot_be_used_is_reported_with_what_to_do(failed: dict[str, tuple[int, list[str]]]) -> None:
    """Which sentence it is depends on the machine: no CUDA in PyTorch, no driver, no GPU, too few GPUs."""
    assert re.search(r"UNFOG_DEVICE=cpu|numbered from 0|[Uu]pdate", failed["UNFOG_DEVICE"][1][-1])


def test_the_sentence_names_the_file(failed: dict[str, tuple[int, list[str]]]) -> None:
    assert WRONG_SETTINGS["UNFOG_CHECKPOINT"] in failed["UNFOG_CHECKPOINT"][1][-1]
    for damage in DAMAGES:
        assert f"{damage.__name__}.safetensors" in failed[damage.__name__][1][-1]


def test_two_services_cannot_share_a_port_and_the_first_goes_on(service: Service) -> None:
    host, port = service.address
    second = Process(UNFOG_PORT=str(port))
    try:
        assert second.wait() == 2
    finally:
        second.end()
    (line,) = second.lines
    assert line.startswith(f"unfog: cannot listen on {host}:{port} (UNFOG_HOST, UNFOG_PORT): ")
    assert service.client.get("/readyz").status_code == 200
