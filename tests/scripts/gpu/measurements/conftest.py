"""Fixtures: a CPU and a simulated GPU with a tiny checkpoint."""

from pathlib import Path

import pytest
import torch

from scripts.gpu.measurements.machine import Machine
from tests.model.tiny_checkpoint import tiny_checkpoint
from tests.scripts.gpu.measurements.pretended import PretendedGpu


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), steps=(10,))


@pytest.fixture
def gpu(tiny: Path) -> PretendedGpu:
    return PretendedGpu(torch.device("cpu"), torch.bfloat16, {"default": tiny})


@pytest.fixture
def cpu(tiny: Path) -> Machine:
    return Machine(torch.device("cpu"), torch.bfloat16, {"default": tiny})
