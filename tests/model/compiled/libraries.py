"""Builds shared libraries that look like a compiled step and crash or hang."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from model.precision import cpp_compiler

CREATE = 'extern "C" int AOTInductorModelContainerCreateWithDevice(void*, unsigned long, char const*, char const*)'
CRASHES = f"{CREATE} {{ *(int volatile*)nullptr = 1; return 0; }}"
HANGS = f"#include <unistd.h>\n{CREATE} {{ for (;;) pause(); }}"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to another user")
OTHER_USER = 12345


def compile_library(source: str, library: Path, *options: str) -> Path:
    """Compiles C++ source to a shared library."""
    command = [cpp_compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library), *options]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    return library


def library_content(source: str, folder: Path) -> bytes:
    """Returns the content of a cached file: the library and its digest."""
    code = compile_library(source, folder / "source.so").read_bytes()
    return code + hashlib.sha256(code).digest()
