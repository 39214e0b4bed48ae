"""Loads folders that diffusers has saved, and refuses those that are damaged, unsupported or not safe."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError
from model.pipelines import folder as module
from model.pipelines.folder import load_pipeline

with warnings.catch_warnings():  # the dependencies of diffusers raise warnings
    warnings.simplefilter("ignore")
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

NETWORK: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONFIG, SCHEDULER, WEIGHTS = "unet/config.json", "scheduler/scheduler_config.json", module.WEIGHTS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with four classes. The tests must not change it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pipelines") / "saved"
    DDPMPipeline(UNet2DModel(**NETWORK, num_class_embeds=4), DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    """Changes values of a JSON file. None removes the key."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_pipeline(path)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_rows_have_their_own_timesteps_and_labels(saved: Path) -> None:
    pipeline = load_pipeline(saved)
    assert (pipeline.image_shape, pipeline.num_classes, pipeline.scheduler.name) == ((3, 8, 8), 4, "DDPMScheduler")
    x_t, t, y = torch.randn(3, 3, 8, 8), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([3, 0, 2])
    theirs = UNet2DModel.from_pretrained(saved, subfolder="unet", use_safetensors=True)
    with torch.no_grad():
        each = [theirs(x_t[k : k + 1], t[k], y[k : k + 1]).sample for k in range(3)]
    assert torch.allclose(pipeline.network(x_t, t, y), torch.cat(each), atol=1e-5)


def test_row_has_the_same_bits_in_every_call_of_the_same_size(saved: Path) -> None:
    network, generator = load_pipeline(saved).network, torch.Generator().manual_seed(0)
    x_t, t, y = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([9.0, 5.0, 700.0, 20.0]), torch.arange(4)
    expected = network(x_t, t, y)[0]
    for place in range(4):
        order = torch.tensor([k for k in (3, 2, 1) if k != place] + [1, 2, 3])[:3].tolist()
        rows = [*order[:place], 0, *order[place:]]
        assert torch.equal(network(x_t[rows], t[rows], y[rows])[place], expected)


def test_flat_folder_without_classes_is_read(tmp_path: Path) -> None:
    DDIMPipeline(UNet2DModel(**NETWORK), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    for part in ("unet", "scheduler"):
        for path in (tmp_path / part).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / part).rmdir()
    pipeline = load_pipeline(tmp_path)
    assert (pipeline.num_classes, pipeline.scheduler.name) == (0, "DDIMScheduler")
    assert pipeline.network(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()).shape == (2, 3, 8, 8)


def test_weights_with_the_names_of_old_releases_are_read(saved: Path, copy: Path) -> None:
    tensors = load_file(saved / "unet" / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, copy / "unet" / WEIGHTS, {"format": "pt"})
    x_t, t, y = torch.ones(1, 3, 8, 8), torch.ones(1), torch.ones(1).long()
    assert torch.equal(load_pipeline(copy).network(x_t, t, y), load_pipeline(saved).network(x_t, t, y))


def test_digest_changes_with_the_weights_and_the_scheduler(saved: Path, copy: Path) -> None:
    first = load_pipeline(saved).sha256
    assert load_pipeline(copy).sha256 == first
    change(copy / SCHEDULER, clip_sample=False)
    assert load_pipeline(copy).sha256 != first


def test_link_of_the_cache_of_the_hub_is_followed_and_others_are_not(saved: Path, copy: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--cats"
    snapshot = Path(shutil.copytree(saved, repository / "snapshots" / "abc"))
    (repository / "blobs").mkdir()
    for path in (snapshot / "unet" / WEIGHTS, copy / "unet" / WEIGHTS):
        shutil.move(path, repository / "blobs" / path.parts[-3])
        path.symlink_to(repository / "blobs" / path.parts[-3])
    assert load_pipeline(snapshot).num_classes == 4
    assert refusal(copy) == f"{copy / 'unet' / WEIGHTS} is not a file in {copy}"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderKL"]},
            "has the part 'vae'. Only pipelines of a UNet2DM",
        ),
        ("model_index.json", {"unet": ["my_code", "UNet2DModel"]}, "the part 'unet' has code of its own, which is not"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "the part 'unet' must be a UNet2DModel"),
        ("model_index.json", {"scheduler": "x"}, "the part 'scheduler' has code of its own"),
        (CONFIG, {"_class_name": "UNet1DModel"}, "_class_name is 'UNet1DModel'. Supported is UNet2DModel"),
        (CONFIG, {"sample_size": [8, 16]}, "sample_size is [8, 16]. Supported is 1 to 256, for square images"),
        (CONFIG, {"sample_size": "8"}, "sample_size is '8'. Supported is"),
        (CONFIG, {"out_channels": 6}, "out_channels is 6. Supported is 3, as in_channels; a learned variance is not"),
        (CONFIG, {"in_channels": 4, "out_channels": 4}, "in_channels is 4. Supported is 1 or 3"),
        (CONFIG, {"block_out_channels": [8, 10**9]}, "block_out_channels is [8, 1000000000]. Supported is a list of"),
        (CONFIG, {"block_out_channels": 8}, "block_out_channels is 8. Supported is a list of 1 to 8 numbers"),
        (CONFIG, {"layers_per_block": 10**6}, "layers_per_block is 1000000. Supported is 1 to 16"),
        (CONFIG, {"class_embed_type": "identity"}, "class_embed_type is 'identity'. Supported is null or 'timestep'"),
        (CONFIG, {"num_class_embeds": 10**7}, "num_class_embeds is 10000000. Supported is 1 to 10000"),
        (CONFIG, {"class_embed_type": "timestep", "num_class_embeds": None}, "num_class_embeds is None. Supported is"),
        (CONFIG, {"wavelets": 3}, "'wavelets' is unknown to the installed diffusers. Install a newer release of it"),
        (CONFIG, {"num_class_embeds": 5}, "cannot be loaded: "),
        (CONFIG, {"num_class_embeds": None}, "does not fit config.json: unexpected keys, such as class_embedding"),
        (CONFIG, {"down_block_types": ["DownBlock2D", "Magic"]}, "cannot be loaded: "),
        (CONFIG, {"block_out_channels": [8, 32]}, "values, but the network of config.json has"),
        (CONFIG, {"block_out_channels": [4096, 4096]}, "values, but the network of config.json has"),
        (CONFIG, {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'. Supported is 'positional'"),
        (SCHEDULER, {"thresholding": True}, "thresholding is True. Supported is False"),
        (SCHEDULER, {"_class_name": "PNDMScheduler"}, "_class_name is 'PNDMScheduler'. Supported schedulers are"),
    ],
)
def test_configuration_that_is_not_supported_is_refused_with_its_key(
    copy: Path, file: str, values: dict[str, Any], message: str
) -> None:
    change(copy / file, **values)
    assert message in refusal(copy)


def remove_weights(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).unlink()


def pickle_weights(folder: Path) -> None:
    remove_weights(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")


def save_variant(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def list_parts(folder: Path) -> None:
    """Lists a file outside of the folder as a part of the weights, which diffusers would load instead."""
    parts = {"metadata": {}, "weight_map": {"conv_in.weight": "../../other.safetensors"}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(parts))


def make_a_pipe_of_the_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    os.mkfifo(folder / "model_index.json")  # reading it would never end


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "unet" / WEIGHTS, 1000)


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / "unet" / WEIGHTS, {"format": "pt"})


def spoil_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    tensors["conv_in.weight"][0] = float("nan")
    save_file(tensors, folder / "unet" / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a folder"),
        (
            lambda folder: (folder / CONFIG).unlink(),
            "is not a pipeline of diffusers: it has neither unet/config.json nor config.json",
        ),
        (
            lambda folder: (folder / SCHEDULER).unlink(),
            "is not a pipeline of diffusers: it has neither scheduler/scheduler_config.json nor scheduler_config.json",
        ),
        (make_a_pipe_of_the_index, "model_index.json is not a file in"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "is not a JSON object of at most 1 MiB"),
        (lambda folder: (folder / CONFIG).write_text("{" * 100_000), "is not valid JSON"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{}"), "is not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text(" " * 2_000_000), "is not a JSON object of at most 1 MiB"),
        (remove_weights, f"has no {WEIGHTS}"),
        (
            pickle_weights,
            "has diffusion_pytorch_model.bin instead of diffusion_pytorch_model.safetensors. If you trust",
        ),
        (list_parts, "lists parts of the weights. Save the network again, in one file"),
        (save_variant, "has diffusion_pytorch_model.fp16.safetensors instead of"),
        (cut_weights, "cannot be loaded: "),
        (drop_a_tensor, "does not fit config.json: missing keys, such as conv_in.weight"),
        (spoil_a_tensor, "has NaN or infinite values"),
    ],
)
def test_damaged_folder_is_refused_with_one_line(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    assert message in refusal(copy)


def test_command_for_a_pickle_converts_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(copy / "unet" / WEIGHTS)
    expected = load_pipeline(copy).sha256
    pickle_weights(copy)
    torch.save(tensors, copy / "unet" / "diffusion_pytorch_model.bin")
    code = refusal(copy).partition('python -c "')[2].removesuffix('"')
    exec(compile(code, "command", "exec"), {})
    assert load_pipeline(copy).num_classes == 4
    assert load_pipeline(copy).sha256 == expected or load_file(copy / "unet" / WEIGHTS).keys() == tensors.keys()


def test_weights_that_do_not_fit_into_the_memory_are_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 10 kB\n")
    monkeypatch.setattr(module, "MEMORY", tmp_path / "meminfo")
    assert "GiB to be loaded, but 0.0 GiB are available" in refusal(saved)
    monkeypatch.setattr(module, "MEMORY", tmp_path / "missing")
    assert load_pipeline(saved).num_classes == 4
