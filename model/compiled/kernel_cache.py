"""Prepares the compilation of GPU kernels. It needs an executable private folder, a C compiler and Python's headers."""

import os
import shutil
import sysconfig
from pathlib import Path

from model.compiled.compiler import GPU_FOLDER, CompilerError
from model.compiled.private_cache import use_private_compile_cache


def prepare_kernel_cache(cache: Path) -> Path:
    """Makes Inductor and Triton keep their kernels in a private folder in `cache`, and returns that folder.

    Raises CompilerError if the folder is mounted read-only or noexec (as /tmp in some containers), or if the C compiler
    or Python's headers are missing. The message says what to install or to set.
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
    """Raises CompilerError without a C compiler or Python's headers. Triton needs them to build its launcher module.

    Triton looks for CC, gcc and clang in this order.
    """
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        raise CompilerError("compiling for a GPU needs a C compiler. Install gcc, or set CC to another compiler")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise CompilerError("compiling for a GPU needs Python's headers. Install the package python3-dev")
