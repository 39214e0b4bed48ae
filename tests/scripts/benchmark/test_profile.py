"""What a step's time is said to be made of."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import load
from model.step import ReverseStep
from scripts.benchmark.profile import KINDS, OTHER, _inputs, kind_of, milliseconds_by_kind
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("aten::mkldnn_convolution", "convolutions and products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "convolutions and products"),
        ("graph_0_cpp_fused_add_gelu_mul_native_group_norm_slice_3", "normalisation"),
        ("graph_0_cpp_fused__to_copy_add_as_strided_clamp_div_mul_rsqrt_sigmoid_view_3", "normalisation"),
        ("aten::native_group_norm", "normalisation"),
        ("aten::gelu", "activations"),
        ("aten::copy_", "copies"),
        ("aten::bitwise_xor", OTHER),
    ],
)
def test_a_kernel_is_of_one_kind(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_step_is_made_of_kinds_that_take_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmark.profile.REPEATS", 3)
    program = ReverseStep(load(save_tiny_checkpoint(tmp_path / "tiny.safetensors")), torch.device("cpu"), torch.float32)
    found = milliseconds_by_kind(program, _inputs(program, 16))
    whole = found.pop("whole")
    assert set(found) <= {kind for kind, _ in KINDS} | {OTHER}
    assert found["convolutions and products"] > 0
    assert found["normalisation"] > 0
    assert whole > 0
