"""Tests that other libraries are rejected. test_compiler.py tests calls of compiled programs."""

import ctypes.util

import pytest

from model.compiled.native import NativeProgram


def test_library_without_a_compiled_program_is_rejected() -> None:
    library = ctypes.util.find_library("c")
    if library is None:
        pytest.skip("the C library is not found by name")
    with pytest.raises(AttributeError, match="AOTInductorModelContainer"):
        NativeProgram(ctypes.CDLL(library), {}, num_outputs=1)
