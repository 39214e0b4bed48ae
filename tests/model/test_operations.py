"""Compares the faster formulas with torch's own operations, in float64 where rounding matters."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.operations import (
    Conv1x1,
    GroupNorm,
    attention,
    attention_by_products,
    gelu,
    gelu_by_sigmoid,
    group_norm_by_channel,
    scaled_group_norm,
)
from tests.model.gpu_operations import gpu_operations

CHANNELS, GROUPS, EPS = 16, 8, 1e-5
DTYPES = (torch.float32, torch.float64)


def images(mean: float = 0.0, std: float = 1.0, rows: int = 3) -> Tensor:
    made = torch.randn(rows, CHANNELS, 7, 7, generator=torch.Generator().manual_seed(0)) * std + mean
    return made.to(memory_format=torch.channels_last)


def weight_and_bias() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(CHANNELS, generator=generator), torch.randn(CHANNELS, generator=generator)


def scales_and_shifts(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, CHANNELS, generator=generator), torch.randn(rows, CHANNELS, generator=generator)


def queries_keys_values() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 4, 49, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(("mean", "std", "tolerance"), [(0, 1, 1e-5), (0, 1e-3, 1e-5), (-3, 0.5, 1e-4), (30, 1, 2e-3)])
def test_group_norm_equals_torch(mean: float, std: float, tolerance: float) -> None:
    x, (weight, bias) = images(mean, std), weight_and_bias()
    truth = F.group_norm(x.double(), GROUPS, weight.double(), bias.double())
    assert (group_norm_by_channel(x, GROUPS, weight, bias, EPS) - truth).abs().max() < tolerance


def test_group_norm_of_a_constant_image_is_the_bias() -> None:
    weight, bias = weight_and_bias()
    x = torch.full((2, CHANNELS, 7, 7), 1.7)
    found = group_norm_by_channel(x, GROUPS, weight, bias, EPS)
    # The tolerance is large, because the rounding error is divided by eps ** 0.5.
    assert torch.allclose(found, bias[:, None, None].expand_as(found), atol=0.2)
    assert torch.isfinite(found).all()


def test_group_norm_sums_bfloat16_in_float32() -> None:
    x, (weight, bias) = images(2.0).bfloat16(), (part.bfloat16() for part in weight_and_bias())
    truth = F.group_norm(x.double(), GROUPS, weight.double(), bias.double())
    found = group_norm_by_channel(x, GROUPS, weight, bias, EPS)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), truth, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize(("mean", "std", "tolerance"), [(0, 1, 1e-5), (0, 1e-3, 1e-5), (-3, 0.5, 1e-4), (300, 1, 1e-3)])
def test_scaled_group_norm_equals_torch(mean: float, std: float, tolerance: float) -> None:
    x, (scale, shift) = images(mean, std), scales_and_shifts()
    truth = F.group_norm(x.double(), GROUPS, eps=EPS) * scale[:, :, None, None] + shift[:, :, None, None]
    with torch.no_grad():
        found = scaled_group_norm(x, GROUPS, scale, shift, EPS)
    assert (found - truth).abs().max() < tolerance
    weight, bias = weight_and_bias()
    truth = F.group_norm(x.double(), GROUPS, weight.double(), bias.double(), EPS)
    assert (scaled_group_norm(x, GROUPS, weight, bias, EPS) - truth).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0, 300.0])
def test_rounding_errors_of_scaled_group_norm_are_no_larger_than_those_of_torch(
    mean: float, dtype: torch.dtype
) -> None:
    x = images(mean, rows=32).to(dtype)
    weight, bias, scale, shift = (part.to(dtype) for part in (*weight_and_bias(), *scales_and_shifts(rows=32)))
    normed = F.group_norm(x.double(), GROUPS, weight.double(), bias.double())
    truth = normed * (1 + scale[:, :, None, None].double()) + shift[:, :, None, None]
    usual = F.group_norm(x, GROUPS, weight, bias) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    with torch.no_grad():
        scale, shift = torch.addcmul(weight, weight, scale), torch.addcmul(bias, bias, scale) + shift
        found = scaled_group_norm(x, GROUPS, scale, shift, EPS)
    assert found.dtype == dtype
    assert (found - truth).square().mean() < (usual - truth).square().mean()


@pytest.mark.parametrize("x", [images(), images().contiguous()], ids=["channels_last", "contiguous"])
def test_scaled_group_norm_returns_channels_last_with_and_without_gradients(x: Tensor) -> None:
    trained = scaled_group_norm(x, GROUPS, *scales_and_shifts(), EPS)
    with torch.no_grad():
        found = scaled_group_norm(x, GROUPS, *scales_and_shifts(), EPS)
    assert torch.equal(found, trained)
    assert found.shape == x.shape
    for result in (found, trained):
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_gradients_of_scaled_group_norm_equal_finite_differences() -> None:
    parts = [part.double().requires_grad_() for part in (images(rows=2)[:, :, :2, :3], *scales_and_shifts(rows=2))]
    assert torch.autograd.gradcheck(lambda x, *affine: scaled_group_norm(x, 4, *affine, EPS), parts)


def test_group_norm_on_a_gpu_equals_torch() -> None:
    norm = GroupNorm(GROUPS, CHANNELS)
    norm.weight.data, norm.bias.data = weight_and_bias()
    with gpu_operations():
        found = norm(images(2.0))
    assert torch.allclose(found, F.group_norm(images(2.0), GROUPS, norm.weight, norm.bias), atol=1e-5)


def test_1x1_convolution_on_a_gpu_equals_torch_and_keeps_channels_last() -> None:
    conv = Conv1x1(CHANNELS, 5)
    with gpu_operations():
        found = conv(images())
    assert torch.allclose(found, F.conv2d(images(), conv.weight, conv.bias), atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv(images()), F.conv2d(images(), conv.weight, conv.bias))


def test_gelu_by_sigmoid_equals_tanh_gelu_of_torch() -> None:
    x = torch.linspace(-30, 30, 10_001)
    truth = F.gelu(x.double(), approximate="tanh")
    assert (gelu_by_sigmoid(x) - truth).abs().max() < 5e-6
    assert gelu_by_sigmoid(x.bfloat16()).dtype == torch.bfloat16


def test_gelu_of_every_bfloat16_value_is_the_same_in_any_batch() -> None:
    """The kernel of torch handles full SIMD vectors and the remaining elements differently."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    alone = torch.stack([gelu(x) for x in every])
    assert torch.equal(gelu(every).view(torch.int16), alone.view(torch.int16))  # distinguishes -0 from 0
    assert torch.allclose(alone.double(), F.gelu(every.double(), approximate="tanh"), rtol=2**-7, atol=1e-6)


def test_operations_without_compilation_equal_torch_bit_for_bit() -> None:
    x, (weight, bias) = images(), weight_and_bias()
    norm = GroupNorm(GROUPS, CHANNELS)
    norm.weight.data, norm.bias.data = weight, bias
    assert torch.equal(norm(x), F.group_norm(x, GROUPS, weight, bias))
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
    q, k, v = queries_keys_values()
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_and_its_gradient_equal_torch_in_float64() -> None:
    found, truth = (tuple(part.to(dtype).requires_grad_() for part in queries_keys_values()) for dtype in DTYPES)
    attended, expected = attention(*found), F.scaled_dot_product_attention(*truth)
    assert torch.allclose(attended.double(), expected, atol=1e-6)
    for gradient, true_one in zip(
        torch.autograd.grad(attended.square().sum(), found),
        torch.autograd.grad(expected.square().sum(), truth),
        strict=True,
    ):
        assert torch.allclose(gradient.double(), true_one, atol=1e-5)


def test_attention_in_training_uses_float32_under_autocast() -> None:
    q, k, v = (part.bfloat16().requires_grad_() for part in queries_keys_values())
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, k, v)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, attention_by_products(q, k, v))
    assert torch.allclose(found.double(), truth, rtol=2**-8, atol=2**-10)


def test_nan_and_infinite_values_are_kept() -> None:
    x = torch.tensor([float("nan"), float("inf")])
    assert not gelu_by_sigmoid(x).isfinite().any()
    assert not gelu(x.bfloat16()).isfinite().any()
    rows = images()
    rows[1, 3, 2, 2] = float("nan")
    weight, bias = weight_and_bias()
    found = group_norm_by_channel(rows, GROUPS, weight, bias, EPS).isnan().flatten(1).any(dim=1)
    assert found.tolist() == [False, True, False]
