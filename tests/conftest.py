"""Fixtures and options of all tests: folders with data, wheels and packages, one compute thread, tiny networks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.compiled import compiler
from model.unet import UNet
from tests.shared_builds import SharedBuilds
from tests.tiny import tiny_unet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir", type=Path, help="folder with the IDX files of MNIST; default: skip the tests that need them"
    )
    parser.addoption("--containers", action="store_true", help="build and run the Docker images; needs a Docker engine")
    parser.addoption(
        "--wheels", type=Path, help="folder with a PyTorch wheel for --containers; default: PyTorch's CPU index"
    )
    parser.addoption(
        "--service",
        metavar="URL",
        help="run the end-to-end tests of the shared service on this one, for example behind a proxy; see tests/e2e",
    )
    parser.addoption(
        "--node-modules", type=Path, help="node_modules folder with the npm package openai; default: npm installs it"
    )


# Files that take longest, with the longest first. With several processes they start first, so that none of them is left
# at the end while the other processes are idle. test_sample.py and test_bench.py come before the other files that need
# a compiled step, so that no process waits while another compiles this step.
FIRST = (
    "tests/e2e/test_containers.py",
    "tests/scripts/test_sample.py",
    "tests/scripts/test_bench.py",
    "tests/e2e/test_ray.py",
    "tests/model/compiled/test_compiler.py",
    "tests/e2e/test_engine_faults.py",
    "tests/scripts/gpu/test_command.py",
    "tests/model/compiled/test_compiled_library.py",
    "tests/model/test_checkpoint.py",
    "tests/e2e/test_random_batches.py",
    "tests/e2e/test_compiled.py",
    "tests/model/compiled/test_triton.py",
    "tests/scripts/test_distil.py",
    "tests/scripts/training/test_several_processes.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would put the files with the fewest tests last


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests of FIRST first, and keeps the order of the others. Skips the tests for a GPU if there is none."""
    place = {config.rootpath / name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu"):
            # Warnings are no errors here, because those of CUDA depend on its version and on the GPU.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.skipif(not has_gpu, reason="needs a GPU"))


@pytest.fixture(scope="session")
def mnist_dir(request: pytest.FixtureRequest) -> Path:
    folder: Path | None = request.config.getoption("--data-dir")
    if folder is None:
        pytest.skip("needs the IDX files of MNIST (--data-dir=FOLDER)")
    return folder.resolve()


@pytest.fixture(scope="session", autouse=True)
def one_compute_thread() -> Iterator[None]:
    """Uses one thread, because several threads are slower for tiny tensors, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps compiled code of the tests out of the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def temporary_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps files and batches of the tests out of the user's data folder. Subprocesses use the temporary one too."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a temporary folder that all test processes of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def shared_builds(shared_folder: Path) -> Iterator[SharedBuilds]:
    """Makes `compiled_step` compile each step only once in this run. Subprocesses are not affected."""
    folder = shared_folder / "builds"
    folder.mkdir(exist_ok=True)
    builds = SharedBuilds(folder, compiler.build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "build", builds.build)
        yield builds


@pytest.fixture(params=["every_block", "bottom"])
def network(request: pytest.FixtureRequest) -> UNet:
    """Returns a tiny U-Net of each conditioning. Every parameter affects the output."""
    return tiny_unet(conditioning=request.param)
