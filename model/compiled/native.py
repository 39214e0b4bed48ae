"""Calls a library of AOTInductor through its C interface (torch/csrc/inductor/aoti_runtime/interface.h).

torch's own Python binding holds the global interpreter lock (GIL) during the whole call (torch 2.13), so the event loop
would be blocked during each step. ctypes releases the GIL.

The C interface takes tensors as handles: addresses of heap-allocated C++ tensors. torch creates such handles, and turns
handles back into tensors. Both functions are undocumented, so pyproject.toml permits tested versions of torch only.
"""

import ctypes
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# torch passes handles to and from Python as capsules: Python objects that wrap a C pointer.
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

OPERATION_FAILED = " API call failed at "  # a part of the message if an operation of torch failed


class _NamedTensor(ctypes.Structure):
    """The struct AOTInductorConstantMapEntry of the C interface."""

    _fields_ = (("name", ctypes.c_char_p), ("tensor", ctypes.c_void_p))


class NativeProgram:
    """A compiled program on the CPU. It takes tensors and returns `num_outputs` tensors. Calls must not overlap.

    `constants` are the weights by name. They are used without a copy. They must have the dtypes, shapes and strides of
    the weights at compile time, or be packed by oneDNN from such weights.
    """

    def __init__(self, library: ctypes.CDLL, constants: Mapping[str, Tensor], num_outputs: int) -> None:
        """Raises AttributeError, KeyError or RuntimeError if the library is not a program for these constants."""
        self._library, self._num_outputs = library, num_outputs
        self._container = ctypes.c_void_p()
        create = library.AOTInductorModelContainerCreateWithDevice
        if create(ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None):
            raise RuntimeError(f"AOTInductor cannot create a program from {library}")
        self._constants = self._set_constants(constants)  # keeps the tensors alive while the program exists

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs the program. Inputs must have the same dtypes as at compile time. This is not checked.

        Raises RuntimeError if an input is not contiguous or the program fails.
        """
        if not all(map(Tensor.is_contiguous, inputs)):
            raise RuntimeError("the inputs of the compiled step must be contiguous")
        input_handles = (ctypes.c_void_p * len(inputs))(*_handles(inputs))  # the program frees the handles
        output_handles = (ctypes.c_void_p * self._num_outputs)()
        num_inputs, num_outputs = ctypes.c_size_t(len(inputs)), ctypes.c_size_t(self._num_outputs)
        self._call("RunSingleThreaded", input_handles, num_inputs, output_handles, num_outputs, None, None)
        outputs = [_new_capsule(handle, None, None) for handle in output_handles]
        return tuple(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(outputs))

    def _set_constants(self, constants: Mapping[str, Tensor]) -> list[Tensor]:
        """Gives the program the weights that it needs. Returns these weights."""
        number = ctypes.c_size_t()
        self._call("GetNumConstants", ctypes.byref(number))
        names = [self._name_of("GetConstantName", index) for index in range(number.value)]
        tensors = [constants[self._name_of("GetConstantOriginalFQN", i).decode()] for i in range(number.value)]
        pairs = zip(names, _handles(tensors), strict=True)
        entries = (_NamedTensor * number.value)(*(_NamedTensor(name, handle) for name, handle in pairs))
        inactive, complete = ctypes.c_bool(False), ctypes.c_bool(True)
        self._call("UpdateUserManagedConstantBufferPairs", entries, number, inactive, complete)
        return tensors

    def _name_of(self, function: str, index: int) -> bytes:
        name = ctypes.c_char_p()
        self._call(function, ctypes.c_size_t(index), ctypes.byref(name))
        assert name.value is not None, "every constant has a name"
        return name.value

    def _call(self, function: str, *arguments: object) -> None:
        if getattr(self._library, f"AOTInductorModelContainer{function}")(self._container, *arguments):
            raise RuntimeError(f"the compiled step failed in {function}: {self._reason()}")

    def _reason(self) -> str:
        """Returns the message of the error in the last call. Both libraries keep the last one of each thread."""
        own = ctypes.c_char_p()
        self._library.AOTInductorGetLastError(ctypes.byref(own))
        message = (own.value or b"").decode(errors="replace")
        if OPERATION_FAILED not in message:
            return message
        # The program knows only which operation failed. torch, to whose library it is linked, knows why.
        of_torch = self._library.torch_exception_get_what_without_backtrace
        of_torch.restype = ctypes.c_char_p
        return (of_torch() or b"").decode(errors="replace")


def _handles(tensors: Iterable[Tensor]) -> list[int]:
    """Returns a new handle for each tensor. A handle is a new reference to the same data."""
    return [_pointer_of(capsule, None) for capsule in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))]
