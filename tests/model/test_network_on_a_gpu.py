"""Compares the operations of the network for a GPU with those for a CPU. Both run on a CPU. Checks memory layouts."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import blocks, checkpoint
from model.unet import UNet
from scripts.benchmark.operations import Operations
from tests.model.gpu_operations import gpu_operations
from tests.tape import tensors
from tests.tiny import tiny_unet

B = 6
ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"conditioning": "bottom"},
    {"residual": False, "num_pairs": 2},
    {"image_channels": 3, "stem_patch": 1, "attention_heads": 0},
    {"widths": (8, 24, 16), "image_size": 16},
]


def inputs(network: UNet, rows: int = B) -> tuple[Tensor, Tensor]:
    """Returns x_t (B, C, H, W) and c (B, D)."""
    size = network.config.image_size
    x_t = torch.randn(rows, network.config.image_channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x_t, network.condition(torch.arange(1, rows + 1) * 97 // rows, torch.arange(rows) % 11)


def channels_last(network: UNet) -> UNet:
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def shipped() -> UNet:
    return channels_last(checkpoint.load(checkpoint.SHIPPED).network)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_output_and_gradients_on_a_gpu_equal_those_on_a_cpu_in_float64(
    architecture: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The attention for training on a CPU computes in float32.
    monkeypatch.setattr(blocks, "attention", F.scaled_dot_product_attention)
    network = channels_last(tiny_unet(**architecture)).double().requires_grad_()
    x_t, c = (part.double().requires_grad_() for part in inputs(network))
    children = (network.stem, network.downs, network.mids, network.ups, network.final_conv)
    parameters = [part for child in children for part in child.parameters()]
    expected = network.denoise(x_t, c)
    with gpu_operations():
        found = network.denoise(x_t, c)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    gradients, truths = (
        torch.autograd.grad(output.square().sum(), [x_t, c, *parameters]) for output in (found, expected)
    )
    for gradient, truth in zip(gradients, truths, strict=True):
        assert torch.allclose(gradient, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_errors_on_a_gpu_are_no_larger_than_those_of_group_norm(shipped: UNet, dtype: torch.dtype) -> None:
    network = deepcopy(shipped).to(dtype)
    x_t, c = (part.to(dtype) for part in inputs(shipped, rows=16))
    with torch.no_grad():
        truth = deepcopy(network).double().denoise(x_t.double(), c.double())
        usual = (network.denoise(x_t, c).double() - truth).square().mean()
        with gpu_operations():
            found = (network.denoise(x_t, c).double() - truth).square().mean()
    assert found <= 1.05 * usual


def test_gradients_under_autocast_are_as_exact_as_those_of_group_norm() -> None:
    network = channels_last(tiny_unet(image_size=16, widths=(16, 32))).requires_grad_()
    x_t, t, y = inputs(network)[0], torch.arange(1, B + 1) * 15, torch.arange(B)

    def gradients(*, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = network(x_t, t, y).float().square().mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])

    truth, usual = gradients(autocast=False), gradients(autocast=True)
    with gpu_operations():
        exact, found = gradients(autocast=False), gradients(autocast=True)
    assert torch.allclose(exact, truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max()))
    assert (found - truth).norm() < 1.1 * (usual - truth).norm()


class Layouts(TorchDispatchMode):
    """Fails if an operation would copy its input or change its layout on a GPU. Counts the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        self.counts[name] += 1
        if name in ("conv2d", "cat", "add", "gelu"):
            images = [part for part in tensors((args, result)) if part.dim() == 4]
            assert all(part.is_contiguous(memory_format=torch.channels_last) for part in images), name
        elif name in ("linear", "layer_norm"):
            assert args[0].is_contiguous(), name
        elif name == "scaled_dot_product_attention":
            assert all(part.stride(-1) == 1 for part in args)
        return result


@pytest.fixture(params=[1, B])
def served(shipped: UNet, request: pytest.FixtureRequest) -> Iterator[Callable[[], Tensor]]:
    """Returns a function that calls the shipped network with 1 or B rows, as the service does on a GPU."""
    network = deepcopy(shipped).bfloat16()
    x_t, c = (part.bfloat16() for part in inputs(shipped, request.param))
    with torch.inference_mode(), gpu_operations():
        yield lambda: network.denoise(x_t, c)


def test_layout_changes_on_a_gpu_only_where_a_norm_gathers_its_groups(served: Callable[[], Tensor]) -> None:
    with Layouts() as layouts:
        served()
    assert layouts.counts["layer_norm"] == layouts.counts["contiguous"] == 11
    assert not {"group_norm", "clone", "copy_", "to", "_to_copy"} & set(layouts.counts)


def test_number_of_operations_on_a_gpu_is_bounded(served: Callable[[], Tensor]) -> None:
    with Operations() as operations:
        served()
    assert operations.counts.total() <= 93  # The number is 97 with torch's group norm, which launches five kernels.
