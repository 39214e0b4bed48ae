import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from model.compiled.private_cache import default_cache, open_private, private_folder
from model.precision import can_compile
from tests.model.compiled.libraries import OTHER_USER, needs_root

ROOT = Path(__file__).parents[3]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) & 0o777  # without the setgid bit, which a subfolder inherits


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The private subfolder that is used if others can write to the folder."""
    return tmp_path / f"private-{os.geteuid()}"


def test_default_cache_of_a_user_without_home_is_below_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 2)  # this user id is not in the user database
    assert default_cache() == Path("/.cache/unfog")


def test_private_folder_is_created_without_write_permission_for_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "new")
    finally:
        os.umask(before)
    assert folder == tmp_path / "new"
    assert mode(folder) == 0o755  # a container image is built by root, but another user reads it


@pytest.mark.parametrize("permissions", [0o775, 0o777, 0o2770, 0o1777])
def test_folder_that_others_can_write_is_replaced_by_a_private_subfolder(
    tmp_path: Path, own: Path, permissions: int
) -> None:
    tmp_path.chmod(permissions)
    assert private_folder(tmp_path) == own
    assert mode(own) == 0o700
    assert private_folder(tmp_path) == own


@needs_root
def test_folder_of_another_user_is_replaced_by_a_private_subfolder(tmp_path: Path, own: Path) -> None:
    os.chown(tmp_path, OTHER_USER, OTHER_USER)
    assert private_folder(tmp_path) == own


@needs_root
def test_private_subfolder_of_another_user_is_rejected(tmp_path: Path, own: Path) -> None:
    own.mkdir(mode=0o700)
    os.chown(own, OTHER_USER, OTHER_USER)
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match=f"owned by user {OTHER_USER}"):
        private_folder(tmp_path)


def test_private_subfolder_that_is_a_symbolic_link_is_rejected(tmp_path: Path, own: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="is not a folder"):
        private_folder(tmp_path)


@needs_root
def test_symbolic_link_of_another_user_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert private_folder(tmp_path / "link") == tmp_path / "link"
    os.lchown(tmp_path / "link", OTHER_USER, OTHER_USER)
    with pytest.raises(PermissionError, match="symbolic link owned by user"):
        private_folder(tmp_path / "link")


def test_private_subfolder_that_others_could_write_is_emptied(
    tmp_path: Path, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With fsGroup, Kubernetes makes all folders of a volume writable by the group at each start of a pod."""
    tmp_path.chmod(0o2770)
    (private_folder(tmp_path) / "step.so").write_text("from before")
    own.chmod(0o2770)
    assert private_folder(tmp_path) == own
    assert mode(own) == 0o700
    assert not list(own.iterdir())
    (record,) = caplog.records
    assert record.getMessage() == "Deleting untrusted cache folder"
    assert "writable by others" in vars(record)["reason"]


def test_private_file_of_this_user_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    with os.fdopen(open_private(tmp_path / "file")) as file:
        assert file.read() == "content"
    with pytest.raises(FileNotFoundError):
        open_private(tmp_path / "missing")


@pytest.mark.parametrize("permissions", [0o664, 0o646])
def test_private_file_that_others_can_write_is_rejected(tmp_path: Path, permissions: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(permissions)
    with pytest.raises(PermissionError, match=f"writable by others \\(mode 0{permissions:o}\\)"):
        open_private(tmp_path / "file")


@needs_root
def test_private_file_of_another_user_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.chown(tmp_path / "file", OTHER_USER, OTHER_USER)
    with pytest.raises(PermissionError, match=f"owned by user {OTHER_USER}"):
        open_private(tmp_path / "file")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_private_file_must_be_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "link":
        (tmp_path / "file").touch()
        path.symlink_to(tmp_path / "file")
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    else:
        path.mkdir()
    with pytest.raises(OSError, match=r"not a regular file|symbolic links"):
        open_private(path)


def run_with_private_cache(cache: Path, temporary: Path, code: str) -> str:
    """Sets up the compile cache in a new process and runs code there. Returns its output."""
    temporary.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    }
    call = (
        "import pathlib, torch; from model.compiled.private_cache import use_private_compile_cache; "
        f"folder = use_private_compile_cache(pathlib.Path({str(cache)!r}))\n{code}"
    )
    command = [sys.executable, "-c", call]
    environment["TMPDIR"] = str(temporary)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


PRINT_FOLDERS = """
from torch._inductor import codecache
from torch._inductor.runtime import cache_dir_utils, runtime_utils
print(codecache.default_cache_dir(), runtime_utils.default_cache_dir(), cache_dir_utils.cache_dir(), sep="\\n")
print(cache_dir_utils.triton_cache_dir(0), codecache.get_lock_dir(), codecache._HEADER_DIR, sep="\\n")
"""


def test_torch_compile_cache_is_in_the_private_folder(tmp_path: Path) -> None:
    folders = run_with_private_cache(tmp_path / "cache", tmp_path / "tmp", PRINT_FOLDERS).splitlines()
    assert len(folders) == 6
    assert all(Path(folder).is_relative_to(tmp_path / "cache" / "torch") for folder in folders)
    assert not list((tmp_path / "tmp").iterdir())
    assert mode(tmp_path / "cache" / "torch") == 0o700


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
def test_torch_compile_writes_nothing_to_the_predictable_folder(tmp_path: Path) -> None:
    run_with_private_cache(
        tmp_path / "cache", tmp_path / "tmp", "torch.compile(lambda x: x.exp().sum(0))(torch.ones(64, 64))"
    )
    assert list((tmp_path / "cache" / "torch").iterdir())
    assert not list((tmp_path / "tmp").glob("torchinductor_*"))


def test_compile_cache_in_a_folder_that_others_can_write_is_temporary(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    code = "print(folder); assert folder.stat().st_mode & 0o777 == 0o700"
    printed = run_with_private_cache(tmp_path / "shared" / "cache", tmp_path / "tmp", code)
    assert f"{tmp_path / 'shared'} is writable by others" in printed
    assert str(tmp_path / "tmp" / "unfog-") in printed
    assert not list((tmp_path / "tmp").iterdir())  # deleted at exit
