"""Names of the Hugging Face Hub. Nothing is downloaded: the cache is a local folder, and the Hub is not reachable."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from model.checkpoint import CheckpointError
from model.pipelines.folder import WEIGHTS, load_pipeline
from model.pipelines.hub import FILES, hub_folder, is_hub_name
from tests.pipelines import write_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
COMMIT = "0123456789abcdef" * 2 + "01234567"
NAME = Path(f"hf:someone/cats@{COMMIT}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of the commit in an empty cache. Downloads fail."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    original = huggingface_hub.snapshot_download

    def snapshot_download(*given: Any, **options: Any) -> str:
        if not options.get("local_files_only"):
            raise ConnectionError("no network\nsecond line")
        return original(*given, **options, cache_dir=tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path / "models--someone--cats" / "snapshots" / COMMIT


def test_pipeline_in_the_cache_is_used_without_a_network(cache: Path) -> None:
    write_pipeline(cache)
    assert hub_folder(NAME) == cache
    assert load_pipeline(hub_folder(NAME)).image_shape == (3, 16, 16)


def test_failed_download_is_one_line_with_the_reason(cache: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        hub_folder(NAME)
    assert str(raised.value) == f"{NAME} is not in the local cache, and the download failed: no network"


def test_incomplete_pipeline_in_the_cache_is_downloaded_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(cache)
    (cache / "unet" / WEIGHTS).unlink()
    local, asked = huggingface_hub.snapshot_download, list[Any]()

    def snapshot_download(repository: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return local(repository, **options)
        asked.append((repository, options))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub_folder(NAME) == cache
    assert asked == [("someone/cats", {"revision": COMMIT, "allow_patterns": FILES})]
    assert not [name for name in FILES if name.endswith((".bin", ".py", ".pkl"))]


@pytest.mark.parametrize(
    "name", ["hf:cats", "hf:someone/cats", "hf:someone/cats@main", f"hf:../cats@{COMMIT[:-1]}", f"hf:a/b/c@{COMMIT}"]
)
def test_name_without_a_commit_is_refused(name: str, cache: Path) -> None:
    assert is_hub_name(Path(name))
    with pytest.raises(CheckpointError, match="is not of the form hf:OWNER/NAME@COMMIT"):
        hub_folder(Path(name))


def test_paths_are_no_names_of_the_hub() -> None:
    assert not is_hub_name(Path("someone/cats"))
    assert not is_hub_name(Path("/tmp/hf:cats"))
