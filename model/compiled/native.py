"""Calls what AOTInductor compiled through its C interface (torch/csrc/inductor/aoti_runtime/interface.h).

torch's own binding keeps the interpreter's lock for the whole call (torch 2.13), so that no other thread, and so
no event loop, could run beside a step. ctypes gives the lock away.
"""

import ctypes
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Entry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("tensor", ctypes.c_void_p))


class NativeProgram:
    """A compiled program on the CPU: tensors in, `num_outputs` tensors out. One call at a time.

    `constants` are its weights by name; they are used where they lie, and must have the types, shapes and strides of
    those that it was compiled with, or be what oneDNN packed of them.
    """

    def __init__(self, library: ctypes.CDLL, constants: Mapping[str, Tensor], num_outputs: int) -> None:
        """AttributeError, KeyError or RuntimeError where the library is none that can be run."""
        self._library, self._num_outputs = library, num_outputs
        self._container = ctypes.c_void_p()
        create = library.AOTInductorModelContainerCreateWithDevice
        if create(ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None):
            raise RuntimeError(f"{library} holds no program")
        self._constants = self._take(constants)  # they live as long as the program does

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Contiguous inputs, of the types that they had when it was compiled; RuntimeError for others in memory."""
        if not all(map(Tensor.is_contiguous, inputs)):
            raise RuntimeError("the compiled step reads its inputs as contiguous, and one is not")
        given = (ctypes.c_void_p * len(inputs))(*_handles(inputs))  # whose tensors the call takes over
        made = (ctypes.c_void_p * self._num_outputs)()
        num_given, num_made = ctypes.c_size_t(len(inputs)), ctypes.c_size_t(self._num_outputs)
        self._ask("RunSingleThreaded", given, num_given, made, num_made, None, None)
        outputs = [_capsule(pointer, None, None) for pointer in made]
        return tuple(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(outputs))

    def _take(self, constants: Mapping[str, Tensor]) -> list[Tensor]:
        number = ctypes.c_size_t()
        self._ask("GetNumConstants", ctypes.byref(number))
        names = [self._name_of("GetConstantName", index) for index in range(number.value)]
        tensors = [constants[self._name_of("GetConstantOriginalFQN", i).decode()] for i in range(number.value)]
        pairs = zip(names, _handles(tensors), strict=True)
        entries = (_Entry * number.value)(*(_Entry(name, handle) for name, handle in pairs))
        inactive, complete = ctypes.c_bool(False), ctypes.c_bool(True)
        self._ask("UpdateUserManagedConstantBufferPairs", entries, number, inactive, complete)
        return tensors

    def _name_of(self, question: str, index: int) -> bytes:
        name = ctypes.c_char_p()
        self._ask(question, ctypes.c_size_t(index), ctypes.byref(name))
        assert name.value is not None, "every constant has a name"
        return name.value

    def _ask(self, question: str, *arguments: object) -> None:
        if getattr(self._library, f"AOTInductorModelContainer{question}")(self._container, *arguments):
            raise RuntimeError(f"the compiled step failed in {question}; its own words are on stderr")


def _handles(tensors: Iterable[Tensor]) -> list[int]:
    """Addresses of new references to the tensors."""
    return [_pointer(capsule, None) for capsule in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))]
