"""Folders and files for compiled code. The process runs what it finds there, so other users must not write to them."""

import atexit
import functools
import logging
import os
import shutil
import stat
import tempfile
import warnings
from pathlib import Path

log = logging.getLogger(__name__)

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def private_folder(folder: Path) -> Path:
    """Creates the folder if needed and returns it, or a private subfolder if others can write to it.

    Raises OSError if neither can be used. A volume with fsGroup in Kubernetes is writable by its group, hence the
    subfolder: others can remove it or replace it, but they cannot write to it, and open_private refuses their files.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    link = folder.lstat()
    if stat.S_ISLNK(link.st_mode) and not _is_trusted_owner(link):
        raise PermissionError(f"{folder} is a symbolic link of user {link.st_uid}")
    reason = _distrust(folder.stat())
    if not reason:
        return folder
    own = folder / f"private-{os.geteuid()}"
    log.info("%s is %s, using its subfolder %s", folder, reason, own.name)
    return _own_folder(own)


def open_private(path: Path) -> int:
    """Opens a file for reading and returns its descriptor; OSError if other users could have written it.

    Owner and mode are those of the open file, so that a file cannot be replaced between this check and its use.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{path} is not a regular file")
        if reason := _distrust(found):
            raise PermissionError(f"{path} is {reason}")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@functools.cache
def use_private_compile_cache(cache: Path) -> Path:
    """Makes torch.compile of this process keep its files in a private folder, by default inside `cache`; returns it.

    By default torch loads and runs what it finds in a folder of /tmp with a predictable name. If `cache` cannot be
    trusted, the folder is a temporary one. Unlike the compiled step, torch's files are found by their path each time.
    Therefore no other user must be able to replace a folder on that path.
    """
    try:
        folder = _own_folder(private_folder(cache).resolve() / "torch")
        for parent in folder.parents:
            if (reason := _distrust(parent.stat())) and not parent.stat().st_mode & stat.S_ISVTX:
                raise PermissionError(f"{parent} is {reason}")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("%s cannot be used, compiled kernels are lost at exit: %s", cache, error)
        folder = Path(tempfile.mkdtemp(prefix="unfog-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(compile_variables(folder))
    _redirect_default_cache(folder)
    return folder


def compile_variables(folder: Path) -> dict[str, str]:
    """The environment in which Inductor and Triton keep their files in a folder."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}


def _redirect_default_cache(folder: Path) -> None:
    """Inductor keeps precompiled headers in its default folder, whatever TORCHINDUCTOR_CACHE_DIR says."""
    with warnings.catch_warnings(action="ignore"):  # of torch about itself
        from torch._inductor import codecache  # imported late: it takes a second, and creates the folder just named
        from torch._inductor.runtime import cache_dir_utils, runtime_utils
    for module in (codecache, cache_dir_utils, runtime_utils):
        module.default_cache_dir = lambda: str(folder)  # type: ignore[attr-defined]
    codecache._HEADER_DIR = str(folder / "precompiled_headers")
    codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers" / "locks")


def _own_folder(folder: Path) -> Path:
    """Creates a folder for this user alone; what others could have written into an existing one is removed."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{folder} is not a folder")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is owned by user {found.st_uid}")
    if reason := _distrust(found):
        log.warning("Removing the content of %s: it was %s", folder, reason)
        shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    return folder


def _distrust(found: os.stat_result) -> str | None:
    """Why others can write to it; None if they cannot."""
    if not _is_trusted_owner(found):
        return f"owned by user {found.st_uid}"
    if found.st_mode & OTHERS_WRITE:
        return f"writable by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def _is_trusted_owner(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())
