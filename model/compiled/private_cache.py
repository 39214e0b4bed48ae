"""Private folders and files for compiled code.

The process runs the code that it finds there. A file that another user could have written would let that user run code
in the service, so such files are refused.
"""

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

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH  # mode bits of a file


def default_cache() -> Path:
    """Returns the default cache folder, `unfog` in $XDG_CACHE_HOME or ~/.cache.

    If the user has no home directory, / is used instead, as in a shell.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "unfog"


def private_folder(folder: Path) -> Path:
    """Creates the folder if needed and returns it. If other users can write to it, returns a private subfolder instead.

    The subfolder is needed for Kubernetes volumes with fsGroup, which are writable by a group. Other users can delete
    or replace the subfolder, but they cannot write to it, and open_private refuses files of other users. Raises OSError
    if neither folder can be used.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    link = folder.lstat()
    if stat.S_ISLNK(link.st_mode) and not _is_trusted_owner(link):
        raise PermissionError(f"{folder} is a symbolic link owned by user {link.st_uid}")
    reason = _why_untrusted(folder.stat())
    if not reason:
        return folder
    subfolder = folder / f"private-{os.geteuid()}"
    log.info("Using private cache subfolder", extra={"path": str(subfolder), "reason": f"{folder} is {reason}"})
    return _create_private(subfolder)


def open_private(path: Path) -> int:
    """Opens a file for reading and returns its descriptor. Raises OSError if other users could have written the file.

    The check reads owner and mode from the open descriptor, so the file cannot be replaced between check and use.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{path} is not a regular file")
        if reason := _why_untrusted(found):
            raise PermissionError(f"{path} is {reason}")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@functools.cache
def use_private_compile_cache(cache: Path) -> Path:
    """Makes torch.compile keep its files in a private folder for the rest of this process, and returns that folder.

    By default torch loads and runs files from a folder of /tmp with a predictable name. The private folder is inside
    `cache`. If other users can change `cache` or replace one of its parent folders, it is a temporary folder, which is
    deleted at exit, and a warning is logged. The parents matter because torch opens its files by path each time,
    without a check of owner and mode.
    """
    try:
        folder = _create_private(private_folder(cache).resolve() / "torch")
        for parent in folder.parents:
            if (reason := _why_untrusted(parent.stat())) and not parent.stat().st_mode & stat.S_ISVTX:
                raise PermissionError(f"{parent} is {reason}")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        # The reason is part of the message because scripts show only the message.
        log.warning("Compile cache not usable, kernels are deleted at exit: %s", error, extra={"path": str(cache)})
        folder = Path(tempfile.mkdtemp(prefix="unfog-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(compile_variables(folder))
    _redirect_default_cache(folder)
    return folder


def compile_variables(folder: Path) -> dict[str, str]:
    """Returns the environment variables that make Inductor and Triton keep their files in this folder."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}


def _redirect_default_cache(folder: Path) -> None:
    """Replaces Inductor's default folder. Inductor ignores TORCHINDUCTOR_CACHE_DIR for its precompiled headers."""
    with warnings.catch_warnings(action="ignore"):  # torch raises warnings about its own code
        # The import is here because it takes a second and creates the folder in TORCHINDUCTOR_CACHE_DIR.
        from torch._inductor import codecache
        from torch._inductor.runtime import cache_dir_utils, runtime_utils
    for module in (codecache, cache_dir_utils, runtime_utils):
        module.default_cache_dir = lambda: str(folder)  # type: ignore[attr-defined]
    codecache._HEADER_DIR = str(folder / "precompiled_headers")
    codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers" / "locks")


def _create_private(folder: Path) -> Path:
    """Creates a folder that only this user can access. Empties an existing folder that is not private."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{folder} is not a folder")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is owned by user {found.st_uid}")
    if reason := _why_untrusted(found):
        log.warning("Deleting untrusted cache folder", extra={"path": str(folder), "reason": reason})
        shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    return folder


def _why_untrusted(found: os.stat_result) -> str | None:
    """Returns the reason why other users can write to a file or folder, or None if they cannot."""
    if not _is_trusted_owner(found):
        return f"owned by user {found.st_uid}"
    if found.st_mode & OTHERS_WRITE:
        return f"writable by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def _is_trusted_owner(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())
