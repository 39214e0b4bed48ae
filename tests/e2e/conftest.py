"""A tiny checkpoint, and services that draw with it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from model.checkpoint import CheckpointConfig, save
from model.sampler import Guidance
from model.schedule import ScheduleConfig
from model.unet import UNet
from tests.e2e.process import Process
from tests.e2e.service import Service
from tests.tiny import tiny_unet

Start = Callable[..., Service]
GUIDANCE = Guidance(scale=2.0, start=20, stop=80)


@pytest.fixture(scope="session")
def network() -> UNet:
    """Random weights: what it draws is noise, and every bit of the noise depends on every option."""
    return tiny_unet(image_size=28, widths=(8, 16))


@pytest.fixture(scope="session")
def checkpoint(network: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the service takes."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = CheckpointConfig(network.config, ScheduleConfig(), guidance=GUIDANCE, training={"label_drop": 0.1})
    save(path, network, config)
    return path


@pytest.fixture(scope="session")
def fast_checkpoint(network: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that permits little: two numbers of steps, one sampler, no guidance."""
    path = tmp_path_factory.mktemp("weights") / "fast.safetensors"
    save(path, network, CheckpointConfig(network.config, ScheduleConfig(), samplers=("ddim",), steps=(4, 2)))
    return path


@pytest.fixture(scope="session")
def service(checkpoint: Path) -> Iterator[Service]:
    """One for all tests that leave it as they found it: rows enough for the largest request."""
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_MAX_BATCH="64", UNFOG_REQUEST_TIMEOUT="300")


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Start]:
    """Starts services with variables of one's own; all have ended when the test has."""
    with ExitStack() as stack:
        yield lambda **variables: start_service(stack, checkpoint, **variables)


def start_service(stack: ExitStack, checkpoint: Path, module: str = "app", **variables: str) -> Service:
    """A service that is ready, and has ended when the stack is closed."""
    process = Process(module, UNFOG_CHECKPOINT=str(checkpoint), **variables)
    stack.callback(process.end)
    service = Service(process)
    stack.callback(service.client.close)
    return service
