"""Compiles and interprets the Triton code that Inductor generates for a GPU, without a GPU (triton_code.py)."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from model.spec import SHIPPED
from tests.model.tiny_checkpoint import tiny_checkpoint

ROOT = Path(__file__).parents[3]
ARCHITECTURES = (75, 80, 86, 90)
# The numbers of kernels that the compiled steps launch, and a few more, because another release of Inductor may fuse
# them differently. With torch's group norm and convolutions of 1x1 the shipped step has 84.
MOST_LAUNCHES = {"tiny": 48 + 4, "shipped": 68 + 4}
TESTED = {"torch": "2.13.", "triton": "3."}  # triton_code.py uses undocumented interfaces


@pytest.fixture(scope="module", autouse=True)
def tested_versions() -> None:
    for package, prefix in TESTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            pytest.skip(f"needs {package} {prefix}*, which the development extra installs on Linux x86-64")
        if not found.startswith(prefix):
            pytest.skip(f"needs {package} {prefix}*, found {found}")


@pytest.fixture
def caches(tmp_path: Path) -> dict[str, str]:
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}


def triton_code(*arguments: str, timeout: float = 280, **variables: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.model.compiled.triton_code", *arguments]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow  # it compiles twice
def test_triton_kernels_of_a_small_step_compile_for_the_oldest_and_the_newest_architecture(
    tmp_path: Path, caches: dict[str, str]
) -> None:
    found = triton_code("step", str(tiny_checkpoint(tmp_path)), str(ARCHITECTURES[0]), str(ARCHITECTURES[-1]), **caches)
    assert found["kernels"] >= 20
    assert found["launches"] <= MOST_LAUNCHES["tiny"]
    assert found["errors"] == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_triton_kernels_of_the_shipped_step_compile_for_every_architecture(caches: dict[str, str]) -> None:
    found = triton_code("step", str(SHIPPED), *map(str, ARCHITECTURES), timeout=1750, **caches)
    assert found["kernels"] >= 25
    assert found["launches"] <= MOST_LAUNCHES["shipped"]
    assert found["errors"] == {}


def test_triton_noise_equals_the_cpu_noise(caches: dict[str, str]) -> None:
    found = triton_code("noise", TRITON_INTERPRET="1", **caches)
    assert found["words"] == 4 * 8 * 196
    assert found["different_words"] == 0
    assert found["normal_error"] < 1e-5
