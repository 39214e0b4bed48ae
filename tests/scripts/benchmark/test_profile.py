"""Tests of the profile of a step."""

import json
from pathlib import Path

import pytest
import torch

from model.checkpoint import load
from model.step import ReverseStep
from scripts import bench
from scripts.benchmark import profile
from scripts.benchmark.profile import (
    KINDS,
    OTHER,
    _inputs,
    kind_of,
    matrix_shares,
    milliseconds_by_kind,
    profile_table,
)
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
def test_kind_of_a_kernel_follows_from_its_name(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_profile_of_a_step_has_times_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmark.profile.REPEATS", 3)
    program = ReverseStep(load(save_tiny_checkpoint(tmp_path / "tiny.safetensors")), torch.device("cpu"), torch.float32)
    found = milliseconds_by_kind(program, _inputs(program, 16))
    whole = found.pop("whole")
    assert set(found) <= {kind for kind, _ in KINDS} | {OTHER}
    assert found["convolutions and products"] > 0
    assert found["normalisation"] > 0
    assert whole > 0


def test_matrix_shares_measure_steps_and_products_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(range(100))  # each step takes 1 s on this clock
    monkeypatch.setattr(profile.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(profile, "matrix_rate", lambda device: calls.append("product") or 4e9)
    monkeypatch.setattr(profile, "TURNS", 3)
    assert matrix_shares(lambda *inputs: calls.append("step"), (), 1_000_000_000) == [0.25] * 3
    assert calls == ["step", "product"] * 3


def test_profile_table_has_the_kinds_in_order_and_the_matrix_share() -> None:
    by_name = {"not compiled": {"activations": 1.0, "whole": 9.0}, "compiled": {"copies": 0.123, "whole": 3.0}}
    columns, lines = profile_table({"rows": 8, "milliseconds": by_name, "matrix_shares": [0.5, 0.25, 0.75]})
    assert columns == ("ms per step of 8 rows", "not compiled", "compiled")
    total, share = "total, without the profiler", "share of the matrix rate, %"
    assert [line[0] for line in lines] == [*(kind for kind, _ in KINDS), "other", total, share]
    assert lines[2:4] == [["activations", "1.00", "0.00"], ["copies", "0.00", "0.12"]]
    assert lines[-2:] == [[total, "9.00", "3.00"], [share, "-", "50 (25 - 75)"]]


def test_profile_of_the_shipped_network_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REPEATS": 2, "TURNS": 2, "_with_names": lambda program, cache: program}.items():
        monkeypatch.setattr(profile, name, value)
    bench.main(["profile", "--rows=2", f"--out={tmp_path / 'profile.json'}"])
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["rows"] == 2
    assert all(found["milliseconds"][name]["whole"] > 0 for name in ("not compiled", "compiled"))
    assert all(0 < share < 2 for share in found["matrix_shares"])
