import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.checkpoint import CheckpointConfig, save
from model.files import check_writable, write_atomically
from model.schedule import ScheduleConfig
from tests.tiny import tiny_unet


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failed_save_keeps_the_old_file_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    network, path = tiny_unet(), tmp_path / "tiny.safetensors"
    config = CheckpointConfig(unet=network.config, schedule=ScheduleConfig())
    save(path, network, config)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(type(error)):
        save(path, network, replace(config, class_names=tuple("abcdefghij")))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_killed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, pathlib, signal, sys; from model.files import write_atomically;"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL);"
        "write_atomically(pathlib.Path(sys.argv[1]), b'new')"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9
    assert path.read_text() == "old"


def test_write_creates_missing_folders_and_a_world_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new" / "file"
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o644


def test_folder_that_cannot_be_written_is_reported_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r": '/proc/self'$"):
        check_writable(Path("/proc/self"))
    check_writable(tmp_path / "runs" / "new")
    assert list((tmp_path / "runs" / "new").iterdir()) == []


def test_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match=f"No space left: '{path}'"):
        write_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"old")]
