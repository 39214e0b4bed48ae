"""What compiling kernels for a GPU needs: a private folder that allows execution, a C compiler, Python's headers."""

import os
import shutil
import sysconfig
from pathlib import Path

from model.compiled.compiler import GPU_FOLDER, CompilerError
from model.compiled.private_cache import use_private_compile_cache


def prepare_kernel_cache(cache: Path) -> Path:
    """Returns the private folder below `cache` in which Inductor and Triton keep kernels from now on.

    CompilerError, with what to do, if its mount does not allow writing or execution, as a container's /tmp may not,
    or if kernels cannot be compiled here.
    """
    _check_compiler()
    folder = use_private_compile_cache(cache / GPU_FOLDER)
    mount = os.statvfs(folder)
    for flag, name in ((os.ST_RDONLY, "read-only"), (os.ST_NOEXEC, "noexec")):
        if mount.f_flag & flag:
            raise CompilerError(
                f"{folder} cannot hold compiled kernels: it is mounted {name}. "
                "Set UNFOG_CACHE_DIR to a private folder on a mount that allows writing and execution"
            )
    return folder


def _check_compiler() -> None:
    """Triton compiles a module for Python at its first start, with the compiler that it looks for in this order."""
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        raise CompilerError("compiling for a GPU needs a C compiler. Install gcc, or name a compiler in CC")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise CompilerError("compiling for a GPU needs Python's headers. Install the package python3-dev")
