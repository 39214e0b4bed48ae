"""A start that fails prints a one-line error and exits with status 2."""

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


def without_metadata(path: Path) -> None:
    save_file({}, path)


def rewrite_metadata(path: Path, part: str, **fields: object) -> None:
    """Changes fields in a part of the metadata and updates the digest."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["unfog"])
    del metadata["digest"]
    metadata[part] |= fields
    metadata["digest"] = tensors_sha256(tensors, json.dumps(metadata, sort_keys=True).encode())
    save_torch_file(tensors, path, {"unfog": json.dumps(metadata)})


def overflowing_size(path: Path) -> None:
    rewrite_metadata(path, "unet", time_dim=10**400)


def network_of_terabytes(path: Path) -> None:
    rewrite_metadata(path, "unet", num_pairs=10**9)


DAMAGES: tuple[Callable[[Path], None], ...] = (
    *(truncated, one_bit_flipped, a_pickle, without_metadata),
    *(overflowing_size, network_of_terabytes),
)
WRONG_SETTINGS = {
    "UNFOG_PORT": "eighty",
    "UNFOG_MAX_BATCH": "0",
    "UNFOG_REQUEST_TIMEOUT": "nan",
    "UNFOG_DEVICE": "cuda:99",
    "UNFOG_DTYPE": "float16",  # not supported on a CPU
    "UNFOG_CHECKPOINT": "/nowhere/to/be/found.safetensors",
}
FAULTS = ("lifespan", "server")  # values of FAULT_AT_START in tests.e2e.faulty_service


@pytest.fixture(scope="module")
def failed_starts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """Returns the exit status and stderr of every start that must fail. Runs two at a time to save time."""
    folder = tmp_path_factory.mktemp("damaged")
    starts = {name: {name: value} for name, value in WRONG_SETTINGS.items()}
    starts |= {fault: {"module": "tests.e2e.faulty_service", "FAULT_AT_START": fault} for fault in FAULTS}
    for damage in DAMAGES:
        path = folder / f"{damage.__name__}.safetensors"
        shutil.copy(checkpoint, path)
        damage(path)
        starts[damage.__name__] = {"UNFOG_CHECKPOINT": str(path)}

    def run(variables: dict[str, str]) -> tuple[int, list[str]]:
        process = Process(is_forked=True, **{"UNFOG_CHECKPOINT": str(checkpoint)} | variables)
        try:
            return process.wait(), process.lines
        finally:
            process.kill()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(starts, pool.map(run, starts.values()), strict=True))


@pytest.mark.parametrize("start", [*WRONG_SETTINGS, *(damage.__name__ for damage in DAMAGES)])
def test_failed_start_is_a_one_line_error_with_status_2(
    failed_starts: dict[str, tuple[int, list[str]]], start: str
) -> None:
    status, lines = failed_starts[start]
    assert status == 2
    assert 1 <= len(lines) <= 2, lines
    assert lines[-1].startswith("unfog: ")
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("fault", FAULTS)
def test_server_or_lifespan_failure_is_status_2_with_an_error_after_the_log(
    failed_starts: dict[str, tuple[int, list[str]]], fault: str
) -> None:
    status, lines = failed_starts[fault]
    assert status == 2
    assert lines[-1].startswith("unfog: the ")
    assert lines[-1].endswith(" failed to start, see the log")
    records = [json.loads(line) for line in lines[:-1]]
    assert any("can't start new thread" in record["message"] + record.get("exception", "") for record in records)


@pytest.mark.parametrize(
    "name", ["UNFOG_PORT", "UNFOG_MAX_BATCH", "UNFOG_REQUEST_TIMEOUT", "UNFOG_DEVICE", "UNFOG_DTYPE"]
)
def test_error_names_the_variable(failed_starts: dict[str, tuple[int, list[str]]], name: str) -> None:
    assert f"{name}={WRONG_SETTINGS[name]}" in failed_starts[name][1][-1].replace("'", "")


def test_error_for_an_unusable_device_says_what_to_do(failed_starts: dict[str, tuple[int, list[str]]]) -> None:
    """The message depends on the machine: PyTorch without CUDA, no driver, no GPU or too few GPUs."""
    assert re.search(r"UNFOG_DEVICE=cpu|numbered from 0|[Uu]pdate", failed_starts["UNFOG_DEVICE"][1][-1])


def test_error_names_the_checkpoint_file(failed_starts: dict[str, tuple[int, list[str]]]) -> None:
    assert WRONG_SETTINGS["UNFOG_CHECKPOINT"] in failed_starts["UNFOG_CHECKPOINT"][1][-1]
    for damage in DAMAGES:
        assert f"{damage.__name__}.safetensors" in failed_starts[damage.__name__][1][-1]


def test_port_in_use_stops_the_second_service_and_not_the_first(service: Service) -> None:
    host, port = service.address
    second = Process(UNFOG_PORT=str(port))
    try:
        assert second.wait() == 2
    finally:
        second.kill()
    (line,) = second.lines
    assert line.startswith(f"unfog: cannot listen on {host}:{port} (UNFOG_HOST, UNFOG_PORT): ")
    assert service.client.get("/readyz").status_code == 200
