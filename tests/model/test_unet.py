from typing import Any

import pytest
import torch
from torch import Tensor

from model.blocks import GELUConvBlock
from model.unet import UNet, UNetConfig
from tests.tiny import tiny_unet

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(4, 1, 8, 8, generator=generator)
    return x_t, torch.tensor([1, 50, 99, 100]), torch.tensor([3, 3, 10, 0])


def differing_rows(a: Tensor, b: Tensor) -> list[int]:
    return [i for i in range(len(a)) if not torch.allclose(a[i], b[i], rtol=1e-4, atol=1e-5)]


@pytest.mark.parametrize(
    "config",
    [
        {"image_size": 28},
        {"image_size": 28, "stem_patch": 1, "widths": (8, 16, 24), "attention_heads": 0, "residual": False},
        {"image_size": 32, "image_channels": 3, "num_pairs": 2},
        {"widths": (8,)},
    ],
    ids=["digits", "textbook", "colour", "one level"],
)
@pytest.mark.parametrize("conditioning", ["every_block", "bottom"])
def test_output_has_the_shape_of_x_t(config: dict[str, Any], conditioning: str) -> None:
    network = tiny_unet(conditioning=conditioning, **config)
    x_t = torch.randn(2, network.config.image_channels, network.config.image_size, network.config.image_size)
    assert network(x_t, torch.tensor([1, 100]), torch.tensor([0, 10])).shape == x_t.shape


@pytest.mark.parametrize("changed_input", ["x_t", "t", "y"])
def test_row_depends_only_on_its_own_inputs(network: UNet, batch: Batch, changed_input: str) -> None:
    x_t, t, y = batch
    before = network(x_t, t, y)
    changed = {"x_t": x_t.clone(), "t": t.clone(), "y": y.clone()}
    changed[changed_input][2] = {"x_t": -x_t[2], "t": torch.tensor(20), "y": torch.tensor(7)}[changed_input]
    assert differing_rows(before, network(**changed)) == [2]


def test_row_has_the_same_output_alone_and_in_a_batch(network: UNet, batch: Batch) -> None:
    together = network(*batch)
    for i in range(4):
        torch.testing.assert_close(network(*(rows[i : i + 1] for rows in batch))[0], together[i], rtol=1e-4, atol=1e-5)


def test_null_label_differs_from_every_class(network: UNet, batch: Batch) -> None:
    assert network.null_label == 10
    x_t = batch[0][:1].expand(11, -1, -1, -1)
    eps = network(x_t, torch.full((11,), 50), torch.arange(11)).flatten(1)
    assert torch.cdist(eps, eps).fill_diagonal_(torch.inf).min() > 1e-2


def test_label_above_the_null_label_is_an_error(network: UNet, batch: Batch) -> None:
    x_t, t, _ = batch
    with pytest.raises(IndexError):
        network(x_t, t, torch.tensor([0, 1, 2, 11]))


def test_output_differs_for_every_timestep(network: UNet, batch: Batch) -> None:
    x_t = batch[0][:1].expand(100, -1, -1, -1)
    eps = network(x_t, torch.arange(1, 101), torch.full((100,), 3)).flatten(1)
    assert torch.cdist(eps, eps).fill_diagonal_(torch.inf).min() > 1e-4


@pytest.mark.parametrize("conditioning", ["every_block", "bottom"])
def test_untrained_network_predicts_zero(batch: Batch, conditioning: str) -> None:
    network = UNet(UNetConfig(image_size=8, widths=(8, 16), attention_heads=2, conditioning=conditioning))
    assert not network(*batch).any()


def test_forward_equals_denoise_of_condition(network: UNet, batch: Batch) -> None:
    x_t, t, y = batch
    assert torch.equal(network.denoise(x_t, network.condition(t, y)), network(x_t, t, y))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("num_pairs", [1, 3])
def test_condition_columns_are_assigned_without_gap_or_overlap(residual: bool, num_pairs: int) -> None:
    network = tiny_unet(residual=residual, num_pairs=num_pairs)
    blocks = [module for module in network.modules() if isinstance(module, GELUConvBlock)]
    assigned = [column for block in blocks for column in range(block.columns.start, block.columns.stop)]
    assert len(assigned) == sum(2 * block.conv.out_channels for block in blocks)
    assert sorted(assigned) == list(range(network.condition_proj.out_features))


def test_every_modulated_block_affects_the_output(batch: Batch) -> None:
    network, (x_t, t, y) = tiny_unet(), batch
    c = network.condition(t, y)
    before = network.denoise(x_t, c)
    for block in (module for module in network.modules() if isinstance(module, GELUConvBlock)):
        other = c.clone()
        other[:, block.columns] += 1
        assert differing_rows(before, network.denoise(x_t, other)) == [0, 1, 2, 3]


def test_bottom_conditioning_is_added_once_after_the_middle_blocks(batch: Batch) -> None:
    network, (x_t, t, y) = tiny_unet(conditioning="bottom"), batch
    assert network.condition_proj.out_features == 16  # the number of channels of the lowest level
    added = []
    handle = network.mids[-1].register_forward_hook(lambda module, args, h: added.append(h))
    network.ups[0].register_forward_pre_hook(lambda module, args: added.append(args[0]))
    network(x_t, t, y)
    handle.remove()
    torch.testing.assert_close(added[1] - added[0], network.condition(t, y)[:, :, None, None].expand_as(added[0]))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_skip_of_every_level_affects_the_output(level: int) -> None:
    network = tiny_unet(widths=(8, 16, 24), stem_patch=1)
    x_t, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10, 90]), torch.tensor([1, 2])
    before = network(x_t, t, y)
    seen = []

    def zero_skip(module: object, args: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        seen.append(output[1].shape)
        return output[0], torch.zeros_like(output[1])

    network.downs[level].register_forward_hook(zero_skip)
    assert differing_rows(before, network(x_t, t, y)) == [0, 1]
    assert seen == [(2, (8, 16, 24)[level], 8 // 2**level, 8 // 2**level)]


def test_all_parameters_have_a_gradient(batch: Batch) -> None:
    network = tiny_unet().requires_grad_(True)
    network(*batch).square().sum().backward()
    without_gradient = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without_gradient == []


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"image_size": 30}, "image_size must be a multiple of 4, got 30"),
        ({"conditioning": "top"}, "unknown conditioning 'top': must be every_block or bottom"),
        ({"stem_patch": 0}, "stem_patch must be at least 1"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_pairs": 0}, "num_pairs must be at least 1"),
        ({"widths": ()}, "widths must be multiples of 8"),
        ({"widths": (0, 8)}, "widths must be multiples of 8"),
        ({"widths": (64, 100)}, "widths must be multiples of 8"),
        ({"attention_heads": 3}, "attention_heads must divide the last width 128, or be 0, got 3"),
        ({"time_dim": 33}, "time_dim must be even and at least 2, got 33"),
    ],
)
def test_invalid_unet_config_is_rejected(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**field)
