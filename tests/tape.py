"""A recording of tensor operations, for fakes of CUDA graphs on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FAR = 2**40  # as a row number it raises IndexError


class Tape(TorchDispatchMode):
    """Records every operation with its arguments and its result, and the memory that operations overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any], Any]] = []
        self.created: list[Tensor] = []
        self._overwritten: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in map(Tensor.untyped_storage, written(func, args, kwargs)):
            self._overwritten.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        known = {memory(value) for value in tensors((args, kwargs))}
        self.created += [value for value in tensors(result) if memory(value) not in known]
        return result

    def restore(self) -> None:
        """Restores the memory as it was before the recording."""
        for storage, before in self._overwritten.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            known = {memory(value) for value in tensors((args, kwargs))}
            if func.is_view and all(memory(value) in known for value in tensors(result)):
                continue  # the recorded view shares the memory of its argument
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if memory(old) != memory(new):
                    old.copy_(new)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the arguments that the operation overwrites."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors([given[name] for name in changed if name in given])


@torch.no_grad()
def spoil(tensor: Tensor) -> None:
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(FAR if tensor.dtype == torch.int64 else 77)
