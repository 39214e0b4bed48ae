from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.checkpoint import SHIPPED, load
from model.compiled.private_cache import default_cache
from model.unet import UNet, UNetConfig
from scripts import compare
from scripts.benchmark.step_time import costs_of, flop_of
from scripts.common.progress import Reporter


def convolutions_of(network: UNet) -> int:
    """Returns the operations of the convolutions in a call with one row, computed from their sizes."""
    flop = 0

    def count(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal flop
        flop += 2 * output.numel() * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        network.denoise(torch.zeros(1, 1, 28, 28), network.condition(torch.tensor([5]), torch.tensor([1])))
    for hook in hooks:
        hook.remove()
    return flop


def test_flop_is_that_of_the_convolutions_without_attention() -> None:
    network = UNet(UNetConfig(stem_patch=2, widths=(16, 32), num_pairs=1, residual=True, attention_heads=0))
    assert flop_of(network) == convolutions_of(network)


def test_shipped_network_has_the_documented_cost() -> None:
    assert flop_of(load(SHIPPED).network) == pytest.approx(0.338e9, rel=0.01)


def test_flop_includes_attention() -> None:
    network = UNet(UNetConfig(stem_patch=2, widths=(16, 32), num_pairs=1, residual=True, attention_heads=4))
    positions = 7 * 7
    assert flop_of(network) == convolutions_of(network) + 2 * 2 * positions**2 * 32  # q k^T, and its product with v


@pytest.mark.parametrize("compiled", [False, True])
def test_costs_of_several_networks_are_measured(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_calls: list[object] = []
    caches: list[Path] = []
    monkeypatch.setattr(torch, "compile", lambda denoise: compiled_calls.append(denoise) or denoise)
    monkeypatch.setattr("scripts.benchmark.step_time.use_private_compile_cache", caches.append)
    small, large = (UNet(UNetConfig(stem_patch=2, widths=widths)) for widths in ((8, 16), (64, 128)))
    weights = [parameter.clone() for parameter in small.parameters()]
    with Reporter() as reporter:
        costs = costs_of({"small": small, "large": large}, reporter, rows=4, compiled=compiled)
    assert len(compiled_calls) == (2 if compiled else 0)
    assert set(caches) == ({default_cache()} if compiled else set())
    assert costs["small"].flop < costs["large"].flop
    assert all(cost.seconds > 0 for cost in costs.values())
    assert costs["large"].num_parameters == sum(p.numel() for p in large.parameters())
    assert all(torch.equal(p, before) for p, before in zip(small.parameters(), weights, strict=True))


def test_table_has_a_line_per_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["networks", "baseline", "default-eps", "--rows=1"])
    lines = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[2:] == [["| baseline", "0.79 M", "0.143"], ["| default-eps", "2.70 M", "0.338"]]


@pytest.mark.parametrize("wrong", [["nothing"], ["default", "default"], [], ["default", "--rows=0"]])
def test_wrong_argument_gives_an_error_of_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        compare.main(["networks", *wrong])
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
