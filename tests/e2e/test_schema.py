"""Requests made from the API's own document, good ones and bad ones, against the running service."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import start_service
from tests.e2e.service import Service

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.fixture(scope="module")
def described(checkpoint: Path) -> Iterator[Service]:
    """One whose largest request is small: hundreds of them are asked for."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300", UNFOG_MAX_COUNT="4")


def run_schemathesis(service: Service, examples: int, folder: Path) -> None:
    """All of its checks, in a folder for what it leaves; what it finds is in the message."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", f"--config-file={CONFIG}", "run", f"{service.url}/openapi.json"),
        *("--mode=all", "--phases=examples,coverage,fuzzing", "--checks=all", f"--max-examples={examples}"),
        *("--seed=1", "--generation-database=none", "--continue-on-failure", "--suppress-health-check=all"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout
    assert not [line for line in service.process.lines if '"level": "error"' in line]
    service.wait_until_idle()


def test_the_service_is_what_its_document_says(described: Service, tmp_path: Path) -> None:
    run_schemathesis(described, 25, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_service_is_what_its_document_says_a_thousand_times(described: Service, tmp_path: Path) -> None:
    run_schemathesis(described, 1000, tmp_path)
