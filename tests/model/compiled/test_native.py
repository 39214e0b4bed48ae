"""Tests failures of libraries. test_compiler.py tests calls of compiled programs."""

import ctypes.util
from pathlib import Path

import pytest
import torch

from model.compiled.native import NativeProgram
from model.precision import can_compile
from tests.model.compiled.libraries import compile_library

# The functions of a compiled program without weights. It fails as the generated code does: with an allocation of torch
# that fails, or with an error of its own.
FAILS = """
#include <cstdint>
#include <cstddef>
extern "C" {
int aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**);
static const char* message = "";
int AOTInductorModelContainerCreateWithDevice(void*, size_t, const char*, const char*) { return 0; }
int AOTInductorModelContainerGetNumConstants(void*, size_t* count) { *count = 0; return 0; }
int AOTInductorModelContainerUpdateUserManagedConstantBufferPairs(void*, void*, size_t, bool, bool) { return 0; }
int AOTInductorGetLastError(const char** found) { *found = message; return 0; }
int AOTInductorModelContainerRunSingleThreaded(void*, void*, size_t inputs, void*, size_t, void*, void*) {
  if (inputs) { message = "expected input vector size to be 0, but got 1"; return 1; }
  int64_t size = int64_t(1) << 60, stride = 1;
  void* tensor;
  if (!aoti_torch_empty_strided(1, &size, &stride, 0, 0, 0, &tensor)) return 0;
  message = "aoti_torch_empty_strided(1, &size, &stride, 0, 0, 0, &tensor) API call failed at step.cpp, line 3";
  return 1;
}
}
"""


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
def test_error_of_a_compiled_program_has_the_reason_of_torch_or_its_own(tmp_path: Path) -> None:
    torch_folder = Path(torch.__file__).parent / "lib"
    library = compile_library(FAILS, tmp_path / "fails.so", f"-L{torch_folder}", "-ltorch_cpu")
    program = NativeProgram(ctypes.CDLL(str(library)), {}, num_outputs=1)
    with pytest.raises(RuntimeError, match=r"failed in RunSingleThreaded: .*DefaultCPUAllocator: can't allocate mem"):
        program()
    with pytest.raises(
        RuntimeError, match="failed in RunSingleThreaded: expected input vector size to be 0, but got 1"
    ):
        program(torch.zeros(1))


def test_library_without_a_compiled_program_is_rejected() -> None:
    library = ctypes.util.find_library("c")
    if library is None:
        pytest.skip("the C library is not found by name")
    with pytest.raises(AttributeError, match="AOTInductorModelContainer"):
        NativeProgram(ctypes.CDLL(library), {}, num_outputs=1)
