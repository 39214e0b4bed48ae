import copy
import dataclasses
import hashlib
import json
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Probe,
    _digest,
    draw_probe,
    load,
    read_config,
    save,
    tensors_sha256,
    weights_sha256,
)
from model.prediction import PredictionConfig
from model.prompts import default_prompt, is_prompt
from model.schedule import Schedule, ScheduleConfig
from model.spec import Guidance
from model.unet import UNet
from tests.tiny import tiny_unet

ROOT = Path(__file__).parents[2]
EACH_CONDITIONING = pytest.mark.parametrize("network", ["every_block", "bottom"], indirect=True)


def config_of(network: UNet, **fields: Any) -> CheckpointConfig:
    return CheckpointConfig(
        unet=network.config,
        schedule=ScheduleConfig(kind="linear"),
        guidance=Guidance(scale=1.5, start=10, stop=90),
        training={"preset": "tiny", "epochs": 3, "label_drop": 0.1, "final_losses": {"train": 0.5}},
        **fields,
    )


@pytest.fixture(params=["every_block"])  # the conditioning has no effect on the checks of the file
def network(request: pytest.FixtureRequest) -> UNet:
    return tiny_unet(conditioning=request.param)


@cache
def content_of(conditioning: str) -> bytes:
    """Returns a saved checkpoint. Saving takes 0.1 s, because it generates the probe image."""
    network = tiny_unet(conditioning=conditioning)
    with TemporaryDirectory() as folder:
        path = Path(folder, "tiny.safetensors")
        save(path, network, config_of(network))
        return path.read_bytes()


@pytest.fixture
def saved(network: UNet, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(content_of(network.config.conditioning))
    return path


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the safetensors header and the offset of the first tensor."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start


def rewrite_metadata(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the metadata, and updates the digest so that it is valid."""
    header, _ = header_of(path)
    metadata = json.loads(header["__metadata__"]["unfog"])
    del metadata["digest"]
    change(metadata)
    save_tensors(path, load_file(path), metadata)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Writes a file with a valid digest."""
    metadata = {name: value for name, value in metadata.items() if name != "digest"}
    metadata["digest"] = _digest(tensors, metadata)
    save_file(tensors, path, {"unfog": json.dumps(metadata)})


def rejection(path: Path) -> str:
    """Loads a file that must be rejected. Returns the error message, which is one line and names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


@EACH_CONDITIONING
def test_load_returns_what_save_wrote(network: UNet, saved: Path) -> None:
    loaded = load(saved)
    assert loaded.config == config_of(network)
    assert loaded.schedule == Schedule(ScheduleConfig(kind="linear"))
    assert loaded.image_shape == (1, 8, 8)
    before, after = network.state_dict(), loaded.network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not loaded.network.training
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_read_config_works_without_the_weights(network: UNet, saved: Path) -> None:
    config = config_of(network, steps=(4, 2), samplers=("ddim",))
    save(saved, network, config)
    _, start = header_of(saved)
    saved.write_bytes(saved.read_bytes()[:start])
    assert read_config(saved) == config


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 8, b"\xff" * 100, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]", pickle.dumps(1)],
)
def test_read_config_rejects_a_foreign_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors is not a checkpoint of unfog"):
        read_config(path)


def test_read_config_rejects_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_config(path)


@EACH_CONDITIONING
def test_loaded_network_gives_the_same_output_as_the_saved_one(network: UNet, saved: Path) -> None:
    batch = torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 100]), torch.tensor([0, 9, 10])
    assert torch.equal(load(saved).network(*batch), network(*batch))


@EACH_CONDITIONING
def test_float16_weights_are_loaded_as_float32_and_match_the_probe_image(network: UNet, tmp_path: Path) -> None:
    save(tmp_path / "half.safetensors", network, config_of(network), dtype=torch.float16)
    loaded = load(tmp_path / "half.safetensors")
    before, after = network.state_dict(), loaded.network.state_dict()
    assert all(torch.equal(before[name].half().float(), after[name]) for name in before)
    fresh = draw_probe(loaded.network, loaded.config)
    assert (loaded.probe_image - fresh).abs().max() <= 0.5 / 127.5 + 1e-4  # the tolerance is half a grey level


@EACH_CONDITIONING
def test_channels_last_weights_are_saved_like_contiguous_weights(network: UNet, saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save(other, network.to(memory_format=torch.channels_last), config_of(network))  # type: ignore[call-overload]
    before, after = load(saved).network.state_dict(), load(other).network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sha256_is_the_digest_of_the_file(saved: Path) -> None:
    printed = subprocess.run(["sha256sum", saved], capture_output=True, text=True, check=True).stdout
    assert load(saved).sha256 == printed.split()[0]


def test_loading_does_not_import_the_compiler_of_torch() -> None:
    """The import would add a second or more to each start."""
    code = "import sys; from model.checkpoint import *; load(SHIPPED); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@EACH_CONDITIONING
def test_saving_twice_writes_the_same_bytes(network: UNet, saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "again.safetensors", network, config_of(network))
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


@EACH_CONDITIONING
def test_probe_image_equals_a_newly_generated_one(saved: Path) -> None:
    loaded = load(saved)
    fresh = draw_probe(loaded.network, loaded.config)
    assert fresh.std() > 0.1  # the probe image is not constant
    assert loaded.probe_image.shape == fresh.shape == (1, 8, 8)
    assert (loaded.probe_image - fresh).abs().max() <= 0.5 / 127.5 + 1e-4  # the tolerance is half a grey level


def test_probe_image_differs_for_other_weights(network: UNet, tmp_path: Path) -> None:
    config = config_of(network, probe=Probe(digit=3, seed=5, num_steps=4, sampler="dpmpp"))
    save(tmp_path / "other.safetensors", network, config)
    other = tiny_unet(seed=1, conditioning=network.config.conditioning)
    loaded = load(tmp_path / "other.safetensors")
    assert loaded.config.probe == config.probe
    assert (loaded.probe_image - draw_probe(other, config)).abs().max() > 0.1


def test_truncated_file_is_rejected(saved: Path) -> None:
    content = saved.read_bytes()
    _, start = header_of(saved)
    for length in (0, 1, 7, 8, 9, start // 2, start - 1, start, (start + len(content)) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        assert "not a complete safetensors file" in rejection(saved)


def test_bytes_after_the_end_are_rejected(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    rejection(saved)


@EACH_CONDITIONING
def test_flipped_bit_in_any_tensor_is_detected(saved: Path) -> None:
    content = saved.read_bytes()
    header, start = header_of(saved)
    del header["__metadata__"]
    assert len(header) > 20
    for number, field in enumerate(header.values()):
        begin, end = field["data_offsets"]
        flipped = bytearray(content)
        flipped[start + begin + number % (end - begin)] ^= 1 << number % 8
        saved.write_bytes(flipped)
        assert "is damaged" in rejection(saved)


def test_swapped_tensors_are_detected(saved: Path) -> None:
    tensors, metadata = load_file(saved), header_of(saved)[0]["__metadata__"]
    a, b = "time_embed.1.bias", "time_embed.3.bias"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, saved, metadata)
    assert "is damaged" in rejection(saved)


def test_flipped_bit_in_the_header_is_detected(saved: Path) -> None:
    content = saved.read_bytes()
    original = load(saved).config
    _, start = header_of(saved)
    for offset in range(0, start, 13):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        saved.write_bytes(flipped)
        try:
            # The JSON can still have the same meaning, for example 1e-05 and 1E-05.
            assert load(saved).config == original
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1


def test_changed_guidance_is_detected(saved: Path) -> None:
    content = saved.read_bytes()
    assert content.count(b'\\"scale\\": 1.5') == 1
    saved.write_bytes(content.replace(b'\\"scale\\": 1.5', b'\\"scale\\": 9.5'))
    assert "is damaged" in rejection(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"unfog": "{"}, {"unfog": "[]"}], ids=str)
def test_foreign_safetensors_file_is_rejected(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(3)}, path, metadata)
    assert "not a checkpoint of unfog" in rejection(path)


def test_pickle_is_rejected_and_never_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Payload()))
    assert "not a complete safetensors file" in rejection(path)
    torch.save({"weight": torch.ones(3)}, path)
    assert "not a complete safetensors file" in rejection(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_other_format_version_is_rejected_with_its_number(saved: Path, version: object) -> None:
    rewrite_metadata(saved, lambda metadata: metadata.update(format_version=version))
    message = rejection(saved)
    assert f"format version {version}" in message
    assert "this release reads version 1" in message


@EACH_CONDITIONING
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_rejected(network: UNet, tmp_path: Path, value: float) -> None:
    path = tmp_path / "nan.safetensors"
    network.mids[0].first.norm.bias[3] = value
    save(path, network, config_of(network, probe=Probe(num_steps=1)))
    assert "NaN or infinite" in rejection(path)


def test_unreadable_path_is_rejected_with_the_reason(saved: Path, tmp_path: Path) -> None:
    assert "No such file" in rejection(tmp_path / "missing.safetensors")
    assert "Is a directory" in rejection(tmp_path)
    assert "Not a directory" in rejection(saved / "deeper")


def test_guidance_by_sampler_overrides_the_recommended_guidance(network: UNet, tmp_path: Path) -> None:
    of_ddpm = Guidance(4.0, 20, 60)
    save(tmp_path / "tiny.safetensors", network, config_of(network, guidance_by_sampler={"ddpm": of_ddpm}))
    config = load(tmp_path / "tiny.safetensors").config
    assert [config.guidance_of(sampler) for sampler in ("ddpm", "ddim")] == [of_ddpm, Guidance(1.5, 10, 90)]


def test_guidance_by_sampler_needs_label_drop(network: UNet) -> None:
    with pytest.raises(ValueError, match="label_drop"):
        CheckpointConfig(network.config, ScheduleConfig(), guidance_by_sampler={"ddpm": Guidance(2.0)})


def test_checkpoint_without_a_prediction_field_predicts_eps(saved: Path) -> None:
    rewrite_metadata(saved, lambda metadata: metadata.pop("prediction"))
    assert load(saved).config.prediction == PredictionConfig("eps")


OPTIONAL = {"training", "prediction", "steps", "guidance_by_sampler", "normalisation"}


@pytest.mark.parametrize("field", [field.name for field in fields(CheckpointConfig) if field.name not in OPTIONAL])
def test_missing_required_field_is_rejected(saved: Path, field: str) -> None:
    rewrite_metadata(saved, lambda metadata: metadata.pop(field))
    assert "not a checkpoint of unfog" in rejection(saved)


PARTS = ("unet", "schedule", "prediction", "guidance", "probe")
WRONG_VALUES: dict[tuple[str, ...], list[object]] = {
    ("unet", "widths"): [[], [0, 0], 8],
    ("unet", "stem_patch"): [0],
    ("unet", "num_steps"): [0],
    ("unet", "num_classes"): ["ten"],
    ("unet", "conditioning"): ["top"],
    ("unet", "image_size"): [16],
    ("unet", "residual"): [False],
    ("schedule", "kind"): ["sigmoid"],
    ("schedule", "num_steps"): [0, -1],
    ("guidance", "scale"): [0.5],
    ("guidance", "start"): [0],
    ("guidance", "stop"): [9],
    ("probe", "sampler"): ["euler"],
    ("probe", "num_steps"): [101],
    ("probe", "digit"): [10],
    ("probe", "seed"): [-1, 2**53],
    ("samplers",): [[], ["ddpm", "euler"]],
    ("probe_image",): ["", "not base64!", 7, None],
    ("steps",): [[0], [4.5], [101], ["4"], [4, -1], 4],
    ("guidance_by_sampler",): [{"euler": {}}, {"ddpm": {"scale": 0.5}}, {"ddpm": {"start": 9, "stop": 8}}, [], 7],
    ("guidance_by_sampler", "ddpm"): [{"invented": 1}],
    ("invented",): [1],
    **{(part, "invented"): [1] for part in PARTS},
}


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in WRONG_VALUES.items() for value in values], ids=str
)
def test_wrong_value_of_a_field_is_rejected(saved: Path, path: tuple[str, ...], value: object) -> None:
    rewrite_metadata(saved, lambda metadata: replace_value(metadata, path, value))
    assert "not a checkpoint of unfog" in rejection(saved)


@pytest.mark.parametrize(
    ("num_steps", "steps", "recommended"), [(100, (), 100), (12, (), 12), (400, (), 100), (100, (4, 2), 4)]
)
def test_recommended_steps_is_the_first_permitted_number_or_at_most_100(
    num_steps: int, steps: tuple[int, ...], recommended: int
) -> None:
    unet, schedule = tiny_unet(num_steps=num_steps).config, ScheduleConfig(num_steps=num_steps)
    config = CheckpointConfig(unet=unet, schedule=schedule, steps=steps, probe=Probe(num_steps=1))
    assert config.spec.default_steps == recommended


def test_digest_covers_names_types_shapes_and_bytes_sorted_by_name() -> None:
    tensors = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[3]])}
    content = b"{}a torch.int64 (1, 1);" + struct.pack("<q", 3) + b"b torch.float32 (2,);" + struct.pack("<2f", 1, -2)
    assert tensors_sha256(tensors, b"{}") == hashlib.sha256(content).hexdigest()


def test_weights_sha256_does_not_depend_on_the_metadata(network: UNet, tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save(one, network, config_of(network))
    save(other, network, dataclasses.replace(config_of(network), guidance=Guidance(3.0)))
    assert load(one).sha256 != load(other).sha256
    assert load(one).weights_sha256 == load(other).weights_sha256
    save(other, network, config_of(network), dtype=torch.float16)
    assert load(other).weights_sha256 == weights_sha256(network, torch.float16) != load(one).weights_sha256


HUGE = 10**400
HOSTILE = [
    *(HUGE, -HUGE, 2**63, 2**31, 10**9, 10**6, 1000, 64, 7, 2, 1, 0, -1, 0.5, 1e308, -0.0, 1e-320, float("nan")),
    *(float("inf"), True, False, None, "", "a", "\n\x1b[2J", "\ud800", "x" * 10_000, "1", [], {}, [[]], {"a": 1}),
    *([HUGE], [8] * 1000, [8] * 2000, [4096] * 8, [2**20, 2**20], [0], [-8], ["8"], [None], [float("nan")]),
    *({"ddpm": None}, {"ddpm": {"scale": HUGE}}, {"": {}}, ["ddpm"] * 2000, [["ddpm"]], [{}], list("0123456789a")),
]


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every field and list item in a JSON value, starting with the empty path."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in paths_in(item, (*path, key)))]


def replace_value(metadata: dict[str, Any], path: tuple[Any, ...], value: object) -> None:
    *parents, last = path
    target: Any = metadata
    for key in parents:
        target = target[key]
    if isinstance(target, dict) == isinstance(last, str):
        target[last] = copy.deepcopy(value)


def assert_loaded_or_rejected(path: Path) -> bool:
    """Returns True if the file is loaded. If it is rejected, checks that the message is short and printable."""
    try:
        load(path)
    except CheckpointError as error:
        message = str(error).removeprefix(str(path))
        assert message.isprintable()
        assert len(message) < 400
        return False
    return True


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_metadata_is_loaded_or_rejected(saved: Path, network: UNet, data: st.DataObject) -> None:
    save(saved, network, config_of(network, guidance_by_sampler={"ddpm": Guidance(2.0)}, steps=(4, 2)))
    original = json.loads(header_of(saved)[0]["__metadata__"]["unfog"])
    del original["digest"]
    any_path = st.sampled_from(paths_in(original)[1:])
    changes = data.draw(st.lists(st.tuples(any_path, st.sampled_from(HOSTILE)), min_size=1, max_size=3))

    def change(metadata: dict[str, Any]) -> None:
        for path, value in changes:
            with suppress(KeyError, IndexError, TypeError):  # A previous change has removed this path.
                replace_value(metadata, path, value)

    rewrite_metadata(saved, change)
    assert_loaded_or_rejected(saved)


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_value_in_any_field_is_loaded_or_rejected(saved: Path, value: object) -> None:
    content = saved.read_bytes()
    metadata = json.loads(header_of(saved)[0]["__metadata__"]["unfog"])
    for part in PARTS:
        for field in metadata[part]:
            saved.write_bytes(content)
            rewrite_metadata(saved, lambda m, part=part, field=field: replace_value(m, (part, field), value))
            assert_loaded_or_rejected(saved)


def set_num_steps(metadata: dict[str, Any], num_steps: object) -> None:
    metadata["unet"]["num_steps"] = metadata["schedule"]["num_steps"] = num_steps


def set_class_name(metadata: dict[str, Any], name: str) -> None:
    metadata["class_names"][7] = name


def set_num_classes(metadata: dict[str, Any], num_classes: int) -> None:
    metadata["unet"]["num_classes"], metadata["class_names"] = num_classes, ["a"] * num_classes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: set_num_steps(m, 10**9), "unet.num_steps must be at most 10000, got 1000000000"),
        (lambda m: set_num_steps(m, HUGE), f"unet.num_steps must be an integer of at most {2**53}"),
        (lambda m: set_num_classes(m, 1001), "class_names must be a list of at most 1000 values"),
        (lambda m: m["unet"].update(widths=[2**40]), "unet.widths must be at most 8 numbers, each at most 4096"),
        (lambda m: m["unet"].update(widths=[8] * 9, image_size=256, stem_patch=1), "unet.widths must be at most 8"),
        (lambda m: m["unet"].update(widths=[4096, 4096]), "but the network needs (4096, 4, 3, 3)"),
        (lambda m: m["unet"].update(image_size=256, widths=[4096]), "a level has more than 4194304 values"),
        (lambda m: m["unet"].update(image_size=256, stem_patch=1, widths=[8]), "more than 1024 positions"),
        (lambda m: m["unet"].update(image_size=10**6), "unet.image_size must be at most 256"),
        (lambda m: m["unet"].update(time_dim=HUGE), "unet.time_dim must be an integer of at most"),
        (lambda m: m["unet"].update(num_pairs=10**9), "unet.num_pairs must be at most 16"),
        (lambda m: m["unet"].update(embed_dim=2**50), "unet.embed_dim must be at most 4096"),
        (lambda m: m["unet"].update(image_size=8.0), "unet.image_size must be an integer"),
        (lambda m: m["unet"].update(residual=1), "unet.residual must be true or false"),
        (lambda m: m["guidance"].update(scale=float("nan")), "guidance.scale must be a number"),
        (lambda m: m["guidance"].update(stop=HUGE), "guidance.stop must be an integer"),
        (lambda m: m["probe"].update(seed=HUGE), "probe.seed must be an integer"),
        (lambda m: m.update(samplers=["heun"]), "samplers[0] must be one of ddpm, ddim, dpmpp, euler"),
        (lambda m: m.update(samplers=["euler"]), "samplers and probe.sampler must be one or more of ddpm, ddim, dpmpp"),
        (lambda m: m.update(class_names=["a"] * 9), "9 class names, but the network has 10 classes"),
        (lambda m: m.update(class_names=[*"abcdefghi", "a"]), "class names must differ, but 'a' occurs more than once"),
        (lambda m: m.update(class_names=["a" * 101, *"bcdefghij"]), "a string of at most 100 characters"),
        (lambda m: m.update(normalisation="imagenet"), "normalisation must be one of auto, mnist, none"),
        (lambda m: m.update(normalisation="mnist"), "normalisation can be mnist only for grey images of 28x28 pixels"),
        (lambda m: m["schedule"].update(num_steps=50), "the schedule has 50 steps, but the network has 100"),
        (
            lambda m: m["schedule"].update(beta_start=0.99, beta_end=0.99),
            "the schedule adds too much noise: alpha_bar must be at",
        ),
        (
            lambda m: m["schedule"].update(beta_start=1e-17),
            "the schedule adds too little noise: alpha_bar must decrease",
        ),
        (lambda m: m["unet"].update(image_channels=2), "unet.image_channels must be 1 (grey) or 3 (colour), got 2"),
        (lambda m: m["unet"].update(image_channels=4), "unet.image_channels must be 1 (grey) or 3 (colour), got 4"),
        (lambda m: set_class_name(m, "\ud800"), r"class names must be printable and not blank, but one is '\ud800'"),
        (lambda m: set_class_name(m, "a\n\x1b[2J"), r"class names must be printable and not blank, but one is 'a\n"),
        (lambda m: set_class_name(m, ""), "class names must be printable and not blank, but one is ''"),
        (lambda m: set_class_name(m, " "), "class names must be printable and not blank, but one is ' '"),
        (lambda m: set_class_name(m, "a" * 101), "class_names[7] must be a string of at most 100 characters"),
        (lambda m: m["guidance"].update(start=101, stop=101), "guidance must start at a timestep of the schedule: at"),
        (
            lambda m: m.update(guidance_by_sampler={"ddim": {"scale": 2, "start": 101, "stop": 200}}),
            "guidance must start at a timestep of the schedule: at most 100",
        ),
        (lambda m: m.update(probe_image="AAAA"), "the probe image has 3 bytes, but the network needs 64"),
        (lambda m: m.update(probe_image="\u0661"), "probe_image must be base64"),
        (lambda m: m["unet"].update({"new\n": 1}), r"unknown field unet.new\n"),
        (lambda m: m.pop("probe"), "probe is missing"),
        (lambda m: m["unet"].update(widths=[8, 24]), "has shape"),
        (lambda m: m["unet"].update(num_pairs=2), "is missing, but the network needs"),
    ],
)
def test_error_about_a_rejected_file_contains_the_reason(
    saved: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    rewrite_metadata(saved, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = rejection(saved)
    assert "is not a checkpoint of unfog: " in message
    assert reason in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    "names", [[*"XxYyAaBbCc"], ["\u96f6", "\u00e9" * 100, "0", "a b", *"123456"]], ids=["case", "texts"]
)
def test_printable_class_names_are_loaded_and_give_valid_prompts(saved: Path, names: list[str]) -> None:
    rewrite_metadata(saved, lambda metadata: metadata.update(class_names=names))
    assert load(saved).config.class_names == tuple(names)
    assert all(map(is_prompt, map(default_prompt, names)))


@pytest.mark.parametrize(
    ("size", "names", "normalisation", "expected"),
    [
        (28, "0123456789", "auto", True),
        (28, "0123456789", "none", False),
        (28, "abcdefghij", "auto", False),
        (28, "abcdefghij", "mnist", True),
        (32, "0123456789", "auto", False),
    ],
)
def test_normalisation_of_drawings_follows_from_the_checkpoint(
    size: int, names: str, normalisation: Literal["auto", "mnist", "none"], expected: bool
) -> None:
    unet = tiny_unet(image_size=size).config
    config = CheckpointConfig(unet, ScheduleConfig(), class_names=tuple(names), normalisation=normalisation)
    assert config.spec.normalises_drawings is expected


@pytest.mark.parametrize("sigma_data", [2**53, 1, 1e-300])
def test_sigma_data_of_any_size_is_loaded(saved: Path, sigma_data: float) -> None:
    rewrite_metadata(saved, lambda metadata: metadata.update(prediction={"kind": "edm", "sigma_data": sigma_data}))
    assert load(saved).config.prediction.sigma_data == sigma_data


def test_unexpected_tensor_is_rejected(saved: Path) -> None:
    tensors, metadata = load_file(saved), json.loads(header_of(saved)[0]["__metadata__"]["unfog"])
    tensors["extra"] = torch.ones(1)
    save_tensors(saved, tensors, metadata)
    assert f"the network has {len(tensors) - 1} tensors, but the file has {len(tensors)}" in rejection(saved)


def test_too_large_conditioning_table_is_rejected_before_allocation(tmp_path: Path) -> None:
    network, path = tiny_unet(num_classes=1000, num_steps=10_000), tmp_path / "wide.safetensors"
    names, probe = tuple(map(str, range(1000))), Probe(num_steps=1)
    save(
        path,
        network,
        CheckpointConfig(network.config, ScheduleConfig(num_steps=10_000), class_names=names, probe=probe),
    )
    assert "the conditioning table" in rejection(path)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_deeply_nested_metadata_is_rejected(saved: Path, depth: int) -> None:
    header = json.loads(header_of(saved)[0]["__metadata__"]["unfog"])
    del header["training"]
    text = json.dumps(header)[:-1] + ', "training": ' + '{"a":' * depth + "1" + "}" * depth + "}"
    save_file(load_file(saved), saved, {"unfog": text})
    rejection(saved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e5m2], ids=str)
def test_weights_of_unsupported_dtype_are_rejected(saved: Path, dtype: torch.dtype) -> None:
    tensors, metadata = load_file(saved), json.loads(header_of(saved)[0]["__metadata__"]["unfog"])
    save_tensors(saved, {name: tensor.to(dtype) for name, tensor in tensors.items()}, metadata)
    assert "weights must be float32, float16 or bfloat16" in rejection(saved)


@pytest.mark.parametrize("version", ["1\n2", "\x1b[2J", "1" * 1000, [[1]], {"a": 1}, HUGE], ids=range(6))
def test_format_version_of_wrong_type_is_rejected_in_one_line(saved: Path, version: object) -> None:
    rewrite_metadata(saved, lambda metadata: metadata.update(format_version=version))
    assert "has format version" in rejection(saved)
    assert not assert_loaded_or_rejected(saved)


def test_endless_or_too_large_file_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.MAX_FILE_BYTES", 2**20)
    assert "is larger than the limit of 1 MiB" in rejection(Path("/dev/zero"))
    sparse = tmp_path / "sparse.safetensors"
    with sparse.open("wb") as file:
        file.truncate(2**40)
    assert "is larger than the limit of 1 MiB" in rejection(sparse)
