"""Where the kernels that are compiled for a GPU are kept, and what compiling them needs.

By default Inductor keeps them in a predictable folder below /tmp and Triton in the home folder. Both load machine code
from there. In a container neither folder can be used: /tmp is mounted noexec and the home folder is read-only.
"""

import os
import shutil
import sysconfig
from pathlib import Path

from model.compiler import CompilerError

FOLDER = "gpu/kernels"  # below the cache; in a container gpu/ is a mount of its own
OTHERS_MAY_WRITE = 0o022


def prepare_kernel_cache(cache: Path) -> Path:
    """Returns the folder below `cache` in which Inductor and Triton keep kernels from now on; makes it if needed.

    Variables that an operator has set win: TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR. CompilerError, with what to
    do, if the folder is not private, not writable or mounted noexec, or if kernels cannot be compiled here.
    """
    _check_compiler()
    folder = cache.resolve() / FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts, mount = folder.stat(), os.statvfs(folder)
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from error
    if facts.st_uid != os.geteuid() or facts.st_mode & OTHERS_MAY_WRITE:
        raise _unusable(folder, "it belongs to another user, or other users can write to it")
    for flag, name in ((os.ST_RDONLY, "read-only"), (os.ST_NOEXEC, "noexec")):
        if mount.f_flag & flag:
            raise _unusable(folder, f"it is mounted {name}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    return folder


def _check_compiler() -> None:
    """Triton compiles a module for Python at its first start, with the compiler that it looks for in this order."""
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        raise CompilerError("compiling for a GPU needs a C compiler. Install gcc, or name a compiler in CC")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise CompilerError("compiling for a GPU needs Python's headers. Install the package python3-dev")


def _unusable(folder: Path, reason: str) -> CompilerError:
    return CompilerError(
        f"{folder} cannot hold compiled kernels: {reason}. "
        "Set UNFOG_CACHE_DIR to a private folder on a mount that allows writing and execution"
    )
