"""Data sets that Ray generates, compared with those of the local engine. All tests share one Ray on this machine."""

import json
import os
import signal
import socket
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scripts import make_dataset
from scripts.common.drawing import Drawer, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation import dataset
from scripts.evaluation.classifiers import DIGITS_SHAPE, Classifier, Trained
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint

ray = pytest.importorskip("ray", reason="needs the extra ray-data")
pytest.importorskip("pandas", reason="needs the extra ray-data")
pytest.importorskip("pyarrow", reason="needs the extra ray-data")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of Ray's modules
    from ray.data import DataContext

    from scripts.evaluation import dataset_ray

COUNT, PART = 45, 10  # five parts
Make = Callable[..., Path]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Starts a Ray with two CPUs and without a C++ compiler. Its folder has a short path, because it has sockets."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-data-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # FutureWarning of Ray about GPUs
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)  # otherwise Ray writes one to the home folder
        patch.setenv("CXX", "/missing/g++")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture
def connected(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the engine use the Ray of all tests."""
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a function that makes a small data set with ten images per part and two images per block."""
    monkeypatch.setattr(dataset, "PART", PART)
    tiny = save_tiny_checkpoint(tmp_path / "tiny.safetensors")

    def run(name: str, *more: str, engine: str, count: int = COUNT) -> Path:
        out = tmp_path / name
        drawing = [f"--checkpoint={tiny}", "--num-steps=2", "--sampler=ddim", "--seed=3", "--batch-size=2"]
        make_dataset.main([f"--out={out}", f"--count={count}", f"--engine={engine}", *drawing, *more])
        return out

    return run


@pytest.fixture
def open_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns a function that opens the engine without a cluster, on hosts with the given resources."""

    def opened(hosts: list[dict[str, Any]], *, num_threads: int | None = None, number: int | None = None) -> Any:
        nodes = [{"Alive": not host.pop("dead", False), "Resources": host} for host in hosts]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(dataset_ray, "_connected", lambda address: nullcontext())
        path = save_tiny_checkpoint(tmp_path / "tiny.safetensors")
        request = DrawingRequest(checkpoint=path, num_threads=num_threads, batch_size=4, compile="off")
        drawer = open_drawer(DrawingRequest(checkpoint=path))
        options = options_from(request, drawer.checkpoint)
        return dataset_ray.ray_engine(request, drawer, options, Reporter(), address=None, num_workers=number)

    return opened


class FirstDropped(Classifier):
    """Gives each digit 0.1, but in the first image that it sees, digit 0 gets almost nothing."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(), 0, DIGITS_SHAPE)
        self.head = nn.Linear(1, 10, bias=False)
        self.is_first = True
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([-20.0, *[0.0] * 9])[:, None])

    def features(self, x: Tensor) -> Tensor:
        features = torch.zeros(len(x), 1)
        features[0], self.is_first = float(self.is_first), False
        return features


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, which raises KeyboardInterrupt after this number of calls."""
    calls = iter(range(number))

    def call_or_stop(*args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*args, **options)

    return call_or_stop


def test_run_continues_with_another_engine_and_gives_the_same_files(
    make: Make, tmp_path: Path, connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray makes the first part and is stopped in the second. The local engine makes the second, and Ray the others."""
    whole = files(make("whole", engine="local"))
    for engine, owner, name, number in (("ray", dataset_ray, "images_of", 7), ("local", Drawer, "draw", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop_after(number, getattr(owner, name)))
            with pytest.raises(SystemExit) as exit_:
                make("stopped", engine=engine)
            assert exit_.value.code == 130
    assert sorted(path.name for path in (tmp_path / "stopped" / "parts").iterdir()) == ["0000000", "0000010"]
    blocks, images_of = Counter[int](), dataset_ray.images_of

    def counted(row: dict[str, Any], facts: dict[str, Any]) -> Tensor:
        blocks[row["process"]] += 1
        return images_of(row, facts)

    monkeypatch.setattr(dataset_ray, "images_of", counted)
    monkeypatch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 60)  # so that no worker starts late
    assert files(make("stopped", engine="ray")) == whole
    assert blocks.total() == 13  # 25 images, with a last block of one image in the last part
    assert len(blocks) == 2, "both workers generate images"


@pytest.mark.slow  # it starts Ray again
def test_killed_worker_changes_no_byte_of_a_filtered_data_set(
    make: Make, connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter drops an image of the first part, so that the second part depends on the first one."""

    def trained(kind: str) -> Trained:
        return Trained(FirstDropped().eval(), {"test_accuracy": 0.5}, "0123abcd")

    monkeypatch.setattr(dataset, "load_classifier", trained)
    given = ["--format=parquet", "--min-confidence=0.05"]
    whole = files(make("whole", *given, engine="local", count=12))
    assert json.loads(whole["dataset.json"])["num_dropped"] == [1, *[0] * 9]
    processes, images_of = list[int](), dataset_ray.images_of

    def kill_first(row: dict[str, Any], facts: dict[str, Any]) -> Tensor:
        processes.append(row["process"])
        if len(processes) == 1:
            os.kill(row["process"], signal.SIGKILL)
        return images_of(row, facts)

    monkeypatch.setattr(dataset_ray, "images_of", kill_first)
    assert files(make("ray", *given, "--workers=1", engine="ray", count=12)) == whole
    assert len(processes) == 5 + 2  # blocks of two images


def test_error_of_a_worker_is_one_line(
    make: Make, tmp_path: Path, connected: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        make("set", "--compile=on", engine="ray")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "A Ray worker has failed" in line
    assert "needs a C++ compiler, but '/missing/g++' was not found" in line
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("by_variable", [False, True])
def test_address_without_a_cluster_is_rejected_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by_variable: bool
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("connects"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nothing listens on this port
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        if by_variable:
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(SystemExit) as exit_:
            make("set", *([] if by_variable else [f"--ray-address={address}"]), engine="ray")
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"No Ray cluster can be reached at {address}" in line


@pytest.mark.parametrize("address", ["nonsense", "ray://10.0.0.1:10001", "10.0.0.1"])
def test_address_must_be_a_host_and_a_port(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("connects"))
    with pytest.raises(SystemExit) as exit_:
        make("set", f"--ray-address={address}", engine="ray")
    assert exit_.value.code == 2
    assert f"--ray-address {address} must be HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hosts", "num_threads", "number", "resources"),
    [
        ([{"CPU": 3}, {"CPU": 5}, {"CPU": 8, "dead": True}], None, 8, {"num_cpus": 1}),
        ([{"CPU": 3}, {"CPU": 5}], 2, 3, {"num_cpus": 2}),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], 4, 3, {"num_gpus": 1}),
    ],
)
def test_default_number_of_workers_uses_the_whole_cluster(
    open_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    hosts: list[dict[str, Any]],
    num_threads: int | None,
    number: int,
    resources: dict[str, int],
) -> None:
    found = list[Any]()

    def facts(self: Any, assignment: dataset_ray.Assignment) -> dict[str, Any]:
        found.append((self.number, self.resources, assignment.num_threads))
        threads = torch.get_num_threads()
        try:
            return dataset_ray.ImageWorker(assignment).facts
        finally:
            torch.set_num_threads(threads)

    monkeypatch.setattr(dataset_ray.Workers, "facts", facts)
    with open_engine(hosts, num_threads=num_threads):
        assert found == [(number, resources, num_threads or 1)]


def test_cluster_without_a_suitable_host_is_rejected(open_engine: Callable[..., Any]) -> None:
    with (
        pytest.raises(ScriptError, match="No host of the Ray cluster has 4 CPUs"),
        open_engine([{"CPU": 2}] * 3, num_threads=4),
    ):
        pass


def test_driver_reads_only_the_blocks_of_the_next_part(
    open_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory does not depend on the number of parts."""
    facts, read = {"weights_sha256": "", "device": "cpu", "dtype": "float32", "compiled": False}, list[int]()

    def rows(self: Any, batches: list[Any], assignment: Any) -> Iterator[dict[str, Any]]:
        for y, _ in batches:
            read.append(len(y))
            yield {"pixels": bytes(784 * len(y)), "facts": json.dumps(facts)}

    monkeypatch.setattr(dataset_ray.Workers, "facts", lambda self, assignment: facts)
    monkeypatch.setattr(dataset_ray.Workers, "rows", rows)
    parts = [(torch.arange(10), torch.arange(10) + 10 * k) for k in range(3)]
    with open_engine([{"CPU": 2}]) as engine:
        for k, images in enumerate(engine.draw(parts), start=1):
            assert images.shape == (10, 1, 28, 28)
            assert read == [4, 4, 2] * k


@pytest.mark.parametrize("name", ["compiled", "torch", "processor", "release"])
def test_worker_with_other_facts_is_rejected(name: str) -> None:
    facts = {"compiled": True, "torch": "2.13.0", "processor": "avx2", "release": "unfog 0.1.0"}
    row = {"pixels": bytes(784), "facts": json.dumps(facts), "host": "10.0.0.2", "process": 7}
    assert dataset_ray.images_of(row, facts).shape == (1, 1, 28, 28)
    with pytest.raises(ScriptError, match=f"worker 7 on 10.0.0.2 .* differs in {name}"):
        dataset_ray.images_of(row, {**facts, name: "other"})
