"""Compares packed with plain weights."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import checkpoint
from model.compiled import compiler
from model.compiled.compiler import FlatStep, library_of
from model.compiled.native import NativeProgram
from model.compiled.packing import Packer, can_pack, take_packed_weights
from model.precision import can_compile
from model.step import ReverseStep, Rows, State, Stepped

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="needs oneDNN's kernels of bfloat16")


class Convolutions(nn.Module):
    """Convolutions with the options of the network, and one with options that the network does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(32, 48, 1)
        self.other = nn.Conv2d(48, 16, 5, stride=2, padding=2, dilation=2, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.wide(self.plain(x)))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(program: ReverseStep, rows: int) -> tuple[State, Tensor, Rows]:
    state, every = State.zeros(rows, program.checkpoint.image_shape, CPU), torch.arange(rows)
    state.x_t.copy_(torch.randn(rows, *program.checkpoint.image_shape, generator=torch.Generator().manual_seed(1)))
    return (
        state,
        torch.tensor([[50.0, 0.9, 0.1, 0.0, 0.1, 1.0, 0.0]]),
        Rows(every, torch.zeros_like(every), every % 10, torch.zeros_like(every), every),
    )


@pytest.mark.parametrize("rows", [1, 7, 64])
@needs_bfloat16
def test_program_for_packed_weights_computes_the_same_bits(rows: int) -> None:
    module = Convolutions().bfloat16().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = torch.randn(rows, 3, 14, 14).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = module(x)
    with torch.no_grad():
        exported = take_packed_weights(torch.export.export(module, (x,)))
        assert not any(node.target is torch.ops.aten.conv2d.default for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x), expected)


@pytest.mark.parametrize("rows", [1, 7, 64])
@needs_bfloat16
def test_packed_weights_have_the_same_values(rows: int) -> None:
    module = Convolutions().bfloat16().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    packer = Packer(module, lambda: module(torch.zeros(1, 3, 14, 14, dtype=torch.bfloat16)))
    packed, state = packer.weights_for(rows), module.state_dict()
    assert set(packed) == {"plain.weight", "wide.weight", "other.weight"}
    for name, weight in packed.items():
        assert weight.is_mkldnn
        assert torch.equal(weight.to_dense(), state[name])


@needs_bfloat16
def test_weights_with_the_same_layout_are_stored_once() -> None:
    module = Convolutions().bfloat16().eval()
    packer = Packer(module, lambda: module(torch.zeros(1, 3, 14, 14, dtype=torch.bfloat16)))
    first, again = packer.weights_for(64), packer.weights_for(64)
    assert all(first[name] is again[name] for name in first)


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
@needs_bfloat16
def test_compiled_step_has_the_same_bits_with_packed_and_plain_weights(
    path: Path, cache: Path, threads: Callable[[int], None]
) -> None:
    program = ReverseStep(checkpoint.load(path), CPU, torch.bfloat16)
    packed = compiler.compiled_step(program, cache)
    library = ctypes.CDLL(str(library_of(program, cache)))
    plain = NativeProgram(library, FlatStep(program).state_dict(), num_outputs=len(Stepped._fields))
    with torch.inference_mode():
        for count in (1, 2, 3):
            threads(count)
            for rows in (1, 2, 5):
                state, plans, of_step = inputs(program, rows)
                found = packed(state, plans, of_step), plain(*state, plans, *of_step)
                for one, other in zip(*found, strict=True):
                    assert torch.equal(one, other)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_weights_are_packed_only_in_bfloat16_on_a_cpu(device: str, dtype: torch.dtype) -> None:
    assert not can_pack(torch.device(device), dtype)
