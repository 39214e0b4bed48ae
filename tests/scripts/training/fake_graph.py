"""A graph that records the operations of a step on a CPU, and fails where a CUDA graph would give wrong results."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.training.graphs import Step

FAR = 2**40  # as a row number it raises IndexError


class FakeGraph:
    """Repeats the recorded operations with the recorded tensors and numbers, as a CUDA graph repeats kernels.

    No Python code of the step runs in a replay. After each replay all `inputs` are overwritten, and before each replay
    all tensors that the recording created. A replay that reads an input that was not set again, or a result of an
    earlier replay, therefore gets NaN or a row number that does not exist.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.inputs: list[Tensor] = []
        self.num_warm_ups = self.num_captures = self.num_replays = 0
        self._generator = generator
        self._tape = Tape()

    def warm_up(self, step: Step) -> Tensor:
        self.num_warm_ups += 1
        return step()

    def capture(self, step: Step) -> Tensor:
        """Records the step. Then restores all tensors and the generator, because a recording runs nothing."""
        self.num_captures += 1
        before = self._generator.get_state()
        with self._tape:
            result = step()
        self._tape.restore()
        self._generator.set_state(before)
        return result

    def replay(self) -> None:
        self.num_replays += 1
        for tensor in self._tape.created:
            spoil(tensor)
        self._tape.replay()
        for tensor in self.inputs:
            spoil(tensor)

    @property
    def calls(self) -> list[tuple[OpOverload, tuple[Any, ...]]]:
        """The recorded operations and their positional arguments."""
        return [call[:2] for call in self._tape.calls]


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
            if func.is_view:
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
