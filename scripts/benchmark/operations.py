"""Counts the tensor operations of a step that launch a kernel on a GPU."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that launch no kernel on a GPU, in addition to views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "resize_", "is_pinned", "_unsafe_view", "lift_fresh"}


class Operations(TorchDispatchMode):
    """Counts the operations that launch a kernel, by the part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.part = "other"

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Counts the operations within the `with` block as those of `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _launches_kernel(func, args, result):
            self.counts[self.part] += 1
        return result


def _launches_kernel(func: Any, args: Any, result: Any) -> bool:
    """Returns True unless an operation only allocates memory, or returns a view of its argument."""
    if func._schema.name.removeprefix("aten::") in NO_KERNEL:
        return False
    if not isinstance(result, Tensor):
        return not func.is_view
    is_view = func.is_view and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
    return not is_view and result.numel() > 0
