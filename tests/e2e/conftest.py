"""Fixtures: tiny checkpoints, and running services that use them."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from model.checkpoint import CheckpointConfig, save
from model.sampler import Guidance
from model.schedule import ScheduleConfig
from model.unet import UNet
from tests.e2e.batch_client import Batches
from tests.e2e.fork import can_fork
from tests.e2e.process import Process
from tests.e2e.service import Service
from tests.postgresql import postgresql
from tests.tiny import COMPILED, tiny_unet

__all__ = ["postgresql"]

Start = Callable[..., Service]
StartBatches = Callable[..., Batches]
Connect = Callable[..., Batches]
JAVASCRIPT = Path(__file__).parent / "javascript"
GUIDANCE = Guidance(scale=2.0, start=20, stop=80)
# The settings of the shared service. One step has room for the largest request (64 images).
SHARED = {"UNFOG_MAX_BATCH": "64", "UNFOG_REQUEST_TIMEOUT": "300"}


@pytest.fixture(scope="session")
def network() -> UNet:
    """Returns a network with random weights. Its images are noise, and every option changes their bits."""
    return tiny_unet(**COMPILED)


@pytest.fixture(scope="session")
def checkpoint(network: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a valid checkpoint with the recommended guidance GUIDANCE. All test processes get the same one."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = CheckpointConfig(network.config, ScheduleConfig(), guidance=GUIDANCE, training={"label_drop": 0.1})
    save(path, network, config)
    return path


@pytest.fixture(scope="session")
def fast_checkpoint(network: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint that permits 2 or 4 steps, the sampler ddim and no guidance."""
    path = tmp_path_factory.mktemp("weights") / "fast.safetensors"
    save(path, network, CheckpointConfig(network.config, ScheduleConfig(), samplers=("ddim",), steps=(4, 2)))
    return path


@pytest.fixture(scope="session")
def service(checkpoint: Path, pytestconfig: pytest.Config) -> Iterator[Service]:
    """Shared service for tests that leave it idle, with the variables SHARED. With --service it runs already."""
    with ExitStack() as stack:
        if url := pytestconfig.getoption("--service"):
            running = Service(None, url)
            stack.callback(running.client.close)
            yield running
        else:
            yield start_service(stack, checkpoint, **SHARED)


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Start]:
    """Returns a function that starts a service with the given environment variables. All stop after the test."""
    with ExitStack() as stack:

        def start_with(module: str = "app", **variables: str) -> Service:
            path = Path(variables.pop("UNFOG_CHECKPOINT", checkpoint))
            return start_service(stack, path, module, **variables)

        yield start_with


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Returns a function that creates a client for the files and batches of a service."""
    with ExitStack() as stack:

        def connect_to(service: Service, key: str = "none", **options: Any) -> Batches:
            return stack.enter_context(closing(Batches(service, key, **options)))

        yield connect_to


@pytest.fixture
def start_batches(start: Start, connect: Connect) -> StartBatches:
    """Returns a function that starts a service as `start` does, and creates a client."""
    return lambda module="app", **variables: connect(start(module, **variables))


@pytest.fixture(scope="session")
def node_modules(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the scripts and OpenAI's JavaScript client. Without --node-modules, npm installs it."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    folder = tmp_path_factory.mktemp("javascript")
    for path in JAVASCRIPT.iterdir():
        shutil.copy(path, folder)
    installed: Path | None = request.config.getoption("--node-modules")
    if installed:
        (folder / "node_modules").symlink_to(installed.resolve(), target_is_directory=True)
        return folder
    if not shutil.which("npm"):
        pytest.skip("needs npm, or --node-modules=FOLDER")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install the client: {done.stderr[-500:]}")
    return folder


def start_service(stack: ExitStack, checkpoint: Path, module: str = "app", **variables: str) -> Service:
    """Starts a service and waits until it is ready. Closing the stack stops it.

    `checkpoint` is not used if the variables name the models. Without UNFOG_DATA_DIR, the service has its own folder
    for files and batches, because only one process can use a folder.
    """
    if "UNFOG_DATA_DIR" not in variables:
        variables["UNFOG_DATA_DIR"] = stack.enter_context(TemporaryDirectory(prefix="unfog-data-"))
    if "UNFOG_MODELS" not in variables:
        variables["UNFOG_CHECKPOINT"] = str(checkpoint)
    process = Process(module, is_forked=can_fork(variables), **variables)
    stack.callback(process.kill)
    service = Service(process)
    stack.callback(service.client.close)
    return service
