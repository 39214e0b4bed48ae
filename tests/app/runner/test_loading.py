"""Tests of load_runner(), which loads the models of the settings or raises an error of one line."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.interface import RunnerError
from app.runner.device import choose_device, choose_dtype
from app.runner.load import load_runner
from app.runner.runner import Runner
from app.settings import Settings
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig, Probe
from model.compiled.compiler import CompilerError
from model.precision import fast_dtype
from model.schedule import ScheduleConfig
from model.spec import SAMPLERS, SHIPPED, Guidance
from tests.app.runner.rows import CPU, GREY_AND_COLOUR, GUIDANCE, new_runner
from tests.tiny import tiny_unet


@pytest.fixture(autouse=True)
def without_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_CLIP", "off")  # test_clip.py loads it


@GREY_AND_COLOUR
def test_model_info_has_the_served_checkpoint_and_precision(path: Path, loaded: Checkpoint) -> None:
    info = load_runner(Settings(checkpoint=path, device="cpu", dtype="bfloat16", compile="off")).models["default"]
    assert (info.name, info.sha256, info.device, info.dtype) == ("default", loaded.sha256, "cpu", "bfloat16")
    assert (info.max_steps, info.samplers, info.guidance_scale, info.guidable) == (
        100,
        SAMPLERS,
        dict.fromkeys(SAMPLERS, 2.0),
        True,
    )
    assert info.guidance_interval == dict.fromkeys(SAMPLERS, (GUIDANCE.start, min(GUIDANCE.stop, 100)))
    assert info.num_parameters == sum(parameter.numel() for parameter in loaded.network.parameters())


def test_checkpoint_file_and_loaded_model_have_the_same_specification(path: Path) -> None:
    info = load_runner(Settings(checkpoint=path, device="cpu", compile="off")).models["default"]
    assert info.spec == checkpoint.read_config(path).spec


def test_number_of_threads_is_limited_if_compilation_fails(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.compiled.compiler.can_compile", lambda: False)
    monkeypatch.setattr("app.runner.device.granted_cores", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        load_runner(Settings(checkpoint=path, device="cpu", dtype="float32", cache_dir=tmp_path))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_model_info_has_the_restrictions_of_the_checkpoint(other: Checkpoint) -> None:
    info = Runner({"default": other}, CPU, torch.float32).models["default"]
    assert (info.steps, info.default_steps, info.samplers, info.guidable) == ((4,), 4, ("ddim",), False)


def test_model_trained_without_dropped_labels_is_not_guidable(loaded: Checkpoint) -> None:
    config = dataclasses.replace(loaded.config, training={}, guidance=Guidance())
    assert not new_runner(dataclasses.replace(loaded, config=config)).models["default"].guidable


def test_error_for_a_missing_checkpoint_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"nothing\.safetensors cannot be read"):
        load_runner(Settings(checkpoint=tmp_path / "nothing.safetensors"))


def test_fast_checkpoint_is_served_as_a_second_model(path: Path) -> None:
    models = load_runner(Settings(checkpoint=path, fast_checkpoint=path, device="cpu", compile="off")).models
    assert list(models) == ["default", "fast"]
    assert models["fast"].name == "fast"


def test_models_of_any_shape_are_served_in_their_order(path: Path, tmp_path: Path) -> None:
    network = tiny_unet(image_size=16, image_channels=3, num_classes=2)
    file = tmp_path / "colour.safetensors"
    config = CheckpointConfig(network.config, ScheduleConfig(), class_names=("cat", "dog"), probe=Probe(digit=1))
    checkpoint.save(file, network, config)
    models = load_runner(Settings(models={"pets": file, "digits": path}, device="cpu", compile="off")).models
    assert [(name, info.image_shape) for name, info in models.items()] == [("pets", (3, 16, 16)), ("digits", (1, 8, 8))]
    assert models["pets"].class_names == ("cat", "dog")


def test_error_for_a_missing_model_names_its_setting(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"^UNFOG_MODELS: .*nothing\.safetensors cannot be read"):
        load_runner(Settings(models={"a": path, "b": tmp_path / "nothing.safetensors"}))


def test_error_for_a_missing_fast_checkpoint_names_its_setting(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"UNFOG_FAST_CHECKPOINT: .*nothing\.safetensors cannot be read"):
        load_runner(Settings(checkpoint=path, fast_checkpoint=tmp_path / "nothing.safetensors"))


def test_error_for_an_unknown_device_names_the_setting() -> None:
    with pytest.raises(RunnerError, match="UNFOG_DEVICE=cuda:99"):
        choose_device("cuda:99")


def test_precision_of_the_settings_is_used() -> None:
    assert choose_dtype("float32", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    assert choose_dtype("auto", CPU) is fast_dtype(CPU)


def test_model_info_has_the_number_of_classes_of_the_checkpoint(loaded: Checkpoint) -> None:
    assert new_runner(loaded).models["default"].num_classes == loaded.config.unet.num_classes


@pytest.mark.parametrize("fault", [None, "the folder is mounted noexec"])
def test_compiling_for_a_gpu_prepares_the_kernel_cache(
    loaded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    prepared: list[Path] = []

    def prepare(cache: Path) -> None:
        prepared.append(cache)
        if fault:
            raise CompilerError(fault)

    runner = new_runner(loaded)
    runner.device = torch.device("cuda")
    monkeypatch.setattr("app.runner.runner.prepare_kernel_cache", prepare)
    monkeypatch.setattr("app.runner.runner.compiled_step", lambda program, cache: program)
    if fault:
        with pytest.raises(RunnerError, match=f"UNFOG_COMPILE=on: {fault}"):
            runner.compile(tmp_path, must=True)
    else:
        assert runner.compile(tmp_path, must=True)
    assert prepared == [tmp_path]


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Makes load_runner choose a GPU. Returns the options of the graph runners that it creates."""
    options: list[dict[str, object]] = []

    def new_graph_runner(models: object, device: object, dtype: object, **given: object) -> Runner:
        options.append(given)
        return Runner(models, CPU, torch.float32)  # type: ignore[arg-type]

    monkeypatch.setattr("app.runner.load.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("app.runner.load.choose_dtype", lambda name, device: torch.float32)
    monkeypatch.setattr("app.runner.load.CudaDevice", lambda device: device)
    monkeypatch.setattr("app.runner.load.GraphRunner", new_graph_runner)
    return options


@pytest.mark.parametrize(
    ("settings", "fixed_rows"),
    [
        ({}, None),
        ({"reproducible": "on"}, 64),
        ({"reproducible": "on", "max_batch": 6}, 6),
        ({"reproducible": "off", "max_batch": 6}, None),
    ],
)
def test_gpu_runs_graphs_of_one_size_if_it_must_be_reproducible(
    path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], fixed_rows: int | None
) -> None:
    options = on_a_gpu(monkeypatch)
    load_runner(Settings(checkpoint=path, **settings))
    assert options == [{"fixed_rows": fixed_rows}]


def test_reproducible_gpu_without_graphs_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    with pytest.raises(RunnerError, match=r"^UNFOG_REPRODUCIBLE=on needs CUDA graphs\. "):
        load_runner(Settings(checkpoint=path, reproducible="on", compile="off"))


def test_folder_without_the_extra_is_refused_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.runner.load.find_spec", lambda name: None)
    with pytest.raises(RunnerError) as raised:
        load_runner(Settings(models=f"own={tmp_path}"))
    assert str(raised.value) == (
        f"UNFOG_MODELS: {tmp_path} cannot be loaded. Pipelines of diffusers need the extra `diffusers`: "
        "scripts/serve --install diffusers"
    )


def test_service_imports_diffusers_only_for_a_pipeline() -> None:
    code = (
        "import sys, app.runner.load; print(sorted({'diffusers', 'huggingface_hub', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("models", "null_labels", "message"),
    [
        (f"own={SHIPPED}", "other=3", "UNFOG_NULL_LABELS names 'other', which is not a served pipeline of diffusers"),
        (f"own={SHIPPED}", "own=3", "UNFOG_NULL_LABELS names 'own', which is not a served pipeline of diffusers"),
    ],
)
def test_null_label_of_another_model_is_refused(models: str, null_labels: str, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        load_runner(Settings(models=models, null_labels=null_labels))
