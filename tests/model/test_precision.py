from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import load
from model.precision import CallRows, fast_dtype
from model.spec import SHIPPED, SHIPPED_FAST
from model.unet import UNet, UNetConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_fast_dtype_is_bfloat16_on_cpus_with_bfloat16_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_dtype(CPU) is expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), torch.float32),  # no tensor cores
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),  # a T4
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_fast_dtype_of_a_gpu_follows_its_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_dtype(CUDA) is expected


@pytest.mark.parametrize("path", [SHIPPED, SHIPPED_FAST], ids=["default", "fast"])
def test_shipped_network_in_float16_is_finite_and_close_to_float32(path: Path) -> None:
    """Runs on a CPU, whose float16 kernels accumulate in float32, as those of a GPU do."""
    half, full = (load(path).network.to(dtype) for dtype in (torch.float16, torch.float32))
    table = load(path).network.condition_table()  # (T + 1, num_classes + 1, D)
    assert table.half().isfinite().all()
    t = torch.arange(1, len(table), 9)
    c = table[t, t % table.shape[1]]  # (B, D)
    torch.manual_seed(0)
    x_t = torch.randn(len(t), *load(path).image_shape)  # (B, C, H, W)
    largest: list[float] = []
    for module in full.modules():
        module.register_forward_hook(lambda module, inputs, output: largest.append(_largest(output)))
    with torch.inference_mode():
        expected = full.denoise(x_t, c)
        actual = half.denoise(x_t.half(), c.half()).float()
    assert actual.isfinite().all()
    assert (actual - expected).abs().mean() < 0.01 * expected.abs().mean()
    assert max(largest) < torch.finfo(torch.float16).max / 16  # activations are far below the overflow


def _largest(output: Tensor | tuple[Tensor, ...]) -> float:
    tensors = output if isinstance(output, tuple) else (output,)
    return max(tensor.abs().max().item() for tensor in tensors)


@pytest.mark.parametrize(
    ("rule", "num_rows", "calls"),
    [
        (CallRows.of(CPU, torch.float32), 1, [16]),
        (CallRows.of(CPU, torch.float32), 16, [16]),
        (CallRows.of(CPU, torch.float32), 35, [16, 16, 16]),
        (CallRows.of(CPU, torch.bfloat16), 1, [1]),
        (CallRows.of(CPU, torch.bfloat16), 35, [35]),
        (CallRows(least=4), 3, [4]),
        (CallRows.of(CUDA, torch.float32), 35, [35]),
    ],
)
def test_call_rows_pads_and_splits_without_changing_results(rule: CallRows, num_rows: int, calls: list[int]) -> None:
    seen: list[int] = []

    def denoise(x_t: Tensor, c: Tensor) -> Tensor:
        seen.append(len(x_t))
        return x_t + c[:, :1, None, None]

    x_t, c = torch.arange(num_rows * 4.0).reshape(num_rows, 1, 2, 2), torch.arange(num_rows)[:, None] * 100.0
    assert torch.equal(rule.call(denoise, x_t, c), x_t + c[:, :, None, None])
    assert seen == calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_row_has_the_same_bits_for_any_batch_and_number_of_threads(
    dtype: torch.dtype,
) -> None:
    """Uses the shipped architecture, because the widths determine which kernels torch selects."""
    torch.manual_seed(0)
    network = UNet(UNetConfig()).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.05)  # some weights are initialized to zero
    c = network.condition(torch.arange(1, 71), torch.arange(70) % 11).to(dtype)
    x_t = torch.randn(70, 1, 28, 28).to(dtype)
    network = network.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def denoise(x: Tensor, c: Tensor) -> Tensor:
        return network.denoise(x.contiguous(memory_format=torch.channels_last), c)

    rule, threads = CallRows.of(CPU, dtype), torch.get_num_threads()
    expected = torch.cat([rule.call(denoise, x_t[i : i + 1], c[i : i + 1]) for i in range(70)])
    assert expected.isfinite().all() and expected.std() > 0.1
    try:
        for num_threads in (1, 2, 3, 5) if dtype == torch.bfloat16 else (1, 2):
            torch.set_num_threads(num_threads)
            for start, stop in [(0, 2), (3, 10), (0, 15), (5, 21), (1, 34), (0, 70)]:
                assert torch.equal(rule.call(denoise, x_t[start:stop], c[start:stop]), expected[start:stop])
    finally:
        torch.set_num_threads(threads)
