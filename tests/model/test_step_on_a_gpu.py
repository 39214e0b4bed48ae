"""Runs the step on tensors without values, as a test of the step on a GPU: a step must not need values on the host."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from model import checkpoint
from model.precision import CallRows
from model.step import ReverseStep, Rows, State
from tests.model.tiny_checkpoint import tiny_checkpoint

# A device other than the CPU whose tensors have no values. Fake tensors of a GPU need a build of torch for GPUs.
DEVICE = torch.device("meta")
B, N, S, P = 5, 8, 16, 100


class Devices(TorchDispatchMode):
    """Fails if an operation waits for the device: if it reads values or moves a tensor between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        assert torch.Tag.data_dependent_output not in func.tags
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(value, Tensor) or value.device == DEVICE, self.names[-1]
        return result


@pytest.mark.parametrize("has_known", [False, True])
@pytest.mark.parametrize("has_noise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_step_never_waits_for_a_gpu(tmp_path: Any, dtype: torch.dtype, has_noise: bool, has_known: bool) -> None:
    loaded = checkpoint.load(tiny_checkpoint(tmp_path))
    program = ReverseStep(loaded, torch.device("cpu"), dtype)
    program.call_rows = CallRows()  # as on a GPU
    shape = loaded.image_shape

    def on_gpu(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    weights = {name: on_gpu(tensor) for name, tensor in program.state_dict(keep_vars=True).items()}
    weights |= {name: on_gpu(buffer) for name, buffer in program.named_buffers()}
    image = torch.empty(S, *shape, device=DEVICE)
    known = torch.empty(S, *shape, device=DEVICE) if has_known else None
    is_known = torch.empty(S, *shape, dtype=torch.bool, device=DEVICE) if has_known else None
    numbers = [torch.empty(S, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    noise = torch.empty(S, 101, *shape, device=DEVICE) if has_noise else None
    state = State(image, image.clone(), known, is_known, *numbers, torch.empty(S, device=DEVICE), noise)
    rows = Rows(*(torch.empty(n, dtype=torch.int64, device=DEVICE) for n in (N, N, N, B, B)))
    with torch.no_grad(), Devices() as devices:
        stepped = functional_call(program, weights, (state, torch.empty(P, 7, device=DEVICE), rows))
    assert stepped.x_prev.shape == stepped.x_0.shape == (B, *shape)
    assert stepped.error.shape == ((N,) if has_known else (0,))
    assert stepped.finite.shape == (B,)
    assert len(devices.names) > 50
