"""What every test may use: the options for real data and containers, one compute thread, tiny networks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.unet import UNet
from tests.tiny import tiny_unet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-dir", type=Path, help="IDX files of MNIST, for the tests that need them")
    parser.addoption("--containers", action="store_true", help="build the images and run them; needs a Docker engine")
    parser.addoption("--wheels", type=Path, help="folder with PyTorch's wheel, for --containers; else its CPU index")


@pytest.fixture(scope="session")
def mnist_dir(request: pytest.FixtureRequest) -> Path:
    folder: Path | None = request.config.getoption("--data-dir")
    if folder is None:
        pytest.skip("needs the IDX files of MNIST: --data-dir=FOLDER")
    return folder.resolve()


@pytest.fixture(scope="session", autouse=True)
def one_compute_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that tests compile is kept where programs of the same user look."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(params=["every_block", "bottom"])
def network(request: pytest.FixtureRequest) -> UNet:
    """A tiny U-Net of either conditioning, every one of whose parameters matters."""
    return tiny_unet(conditioning=request.param)
