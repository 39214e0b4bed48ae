"""Loads a pipeline that diffusers has saved: a folder with a UNet2DModel and a scheduler.

Both layouts are read: with the folders `unet` and `scheduler`, and that of old repositories, which have no folders. The
folder is not trusted. Only JSON and safetensors are read, no code of the folder is executed, and sizes are checked
before memory is allocated.
"""

import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.checkpoint import CheckpointError, check_names
from model.pipelines.schedulers import Scheduler

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORK = "UNet2DModel"
NAMES = "id2label"  # key of the names of the classes in the index
MAX_JSON_BYTES = 1 << 20
# Limits of a network, which are checked before it is built.
LARGEST_IMAGE, MAX_LEVELS, MAX_WIDTH, MAX_LAYERS, MAX_CLASSES = 256, 8, 4096, 16, 10_000
MEMORY = Path("/proc/meminfo")
COPIES = 2  # of the weights in memory while they are loaded
MOST_GROWTH = 2  # ratio of the values of the network to those of its file; a larger network certainly does not fit


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A loaded pipeline. `network` is called with (x_t, t, y). It is in evaluation mode, float32 and on the CPU."""

    network: "PipelineNetwork"
    scheduler: Scheduler
    image_shape: tuple[int, int, int]  # (C, H, W)
    class_names: tuple[str, ...]  # of the labels of the network; empty for a network without classes
    sha256: str  # digest of the weights and of both configurations
    architecture: tuple[object, ...]  # configuration of the network, and the release of diffusers

    @property
    def num_classes(self) -> int:
        """The number of labels of the network, or 0."""
        return len(self.class_names)


class PipelineNetwork(nn.Module):
    """A UNet2DModel as a function of x_t (B, C, H, W), the timesteps t (B,) of diffusers and the labels y (B,).

    Each row has its own timestep and label. Without classes, y is not used.
    """

    def __init__(self, unet: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.unet, self.num_classes = unet, num_classes

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self.unet(x_t, t, class_labels=y if self.num_classes else None, return_dict=False)[0]
        return output


def load_pipeline(folder: Path, *, eta: float = 0.0, use_clipped_model_output: bool = False) -> Pipeline:
    """Loads a folder of `save_pretrained`. `Scheduler` explains the other arguments.

    Raises CheckpointError if the folder is not complete, not supported, or too large for the memory.
    """
    files = _files_of(folder)
    config, scheduler_config = _read_json(files.config), _read_json(files.scheduler)
    image_shape, num_classes = _check_network(files.config, config)
    class_names = _class_names(folder / INDEX, num_classes)
    _check_memory(files.weights)
    try:
        scheduler = Scheduler(scheduler_config, eta=eta, use_clipped_model_output=use_clipped_model_output)
    except ValueError as error:
        raise CheckpointError(f"{files.scheduler}: {error}") from error
    unet = _load_network(files)
    digest = hashlib.sha256()
    for path in (files.weights, files.config, files.scheduler):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    network = PipelineNetwork(unet, num_classes).eval().requires_grad_(False)
    release = importlib.import_module("diffusers").__version__
    architecture = (release, *sorted((key, str(value)) for key, value in config.items() if key[0] != "_"))
    return Pipeline(network, scheduler, image_shape, class_names, digest.hexdigest(), architecture)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a pipeline. `config` and `weights` are those of the network and in the same folder."""

    config: Path
    weights: Path
    scheduler: Path


def _files_of(folder: Path) -> _Files:
    """Finds the files of a pipeline, which must be in the folder. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    of_network = folder / "unet" if (folder / "unet" / CONFIG).exists() else folder
    of_scheduler = folder / "scheduler" if (folder / "scheduler" / SCHEDULER).exists() else folder
    files = _Files(of_network / CONFIG, of_network / WEIGHTS, of_scheduler / SCHEDULER)
    for part, path in (("unet", files.config), ("scheduler", files.scheduler)):
        if not path.exists():
            missing = f"it has neither {part}/{path.name} nor {path.name}"
            raise CheckpointError(f"{folder} is not a pipeline of diffusers: {missing}")
    if (parts := of_network / f"{WEIGHTS}.index.json").exists():  # diffusers would load other files than WEIGHTS
        raise CheckpointError(f"{parts} lists parts of the weights. Save the network again, in one file")
    if not files.weights.exists():
        raise CheckpointError(_without_weights(folder, of_network))
    index = [folder / INDEX] if (folder / INDEX).exists() else []
    for path in (files.config, files.weights, files.scheduler, *index):
        _check_inside(path, folder)
    for path in index:
        _check_parts(path)
    return files


def _check_parts(path: Path) -> None:
    """Raises CheckpointError if a pipeline has other parts than a UNet2DModel and a scheduler, or code of its own."""
    parts = {name: part for name, part in _read_json(path).items() if not name.startswith("_") and part != [None, None]}
    parts.pop(NAMES, None)
    for name in sorted(parts):
        part = parts[name]
        if name not in ("unet", "scheduler"):
            raise CheckpointError(
                f"{path} has the part {name!r}. Only pipelines of a {NETWORK} and a scheduler can run"
            )
        if not (isinstance(part, list) and len(part) == 2 and part[0] == "diffusers"):
            raise CheckpointError(f"{path}: the part {name!r} has code of its own, which is not executed")
    if parts.get("unet") != ["diffusers", NETWORK]:
        raise CheckpointError(f"{path}: the part 'unet' must be a {NETWORK} of diffusers")


def _class_names(index: Path, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the labels: those of `id2label`, as DiTPipeline has it, or otherwise "class 0" and so on.

    Raises CheckpointError for invalid names.
    """
    given = _read_json(index).get(NAMES) if index.exists() and num_classes else None
    if given is None:
        return tuple(f"class {label}" for label in range(num_classes))
    if not isinstance(given, dict) or set(given) != set(map(str, range(num_classes))):
        raise CheckpointError(f"{index}: {NAMES} must have a name for each label from 0 to {num_classes - 1}")
    names = tuple(given[str(label)] for label in range(num_classes))
    try:
        if not all(isinstance(name, str) for name in names):
            raise ValueError("class names must be texts")
        check_names(names, num_classes)
    except ValueError as error:
        raise CheckpointError(f"{index}: {NAMES} is not valid: {error}") from error
    return names


def _without_weights(folder: Path, of_network: Path) -> str:
    others = sorted(path.name for path in of_network.glob("diffusion_pytorch_model*"))
    if not others:
        return f"{of_network} has no {WEIGHTS}"
    shown = f"{of_network} has {others[0]} instead of {WEIGHTS}"
    if not others[0].endswith(".bin"):
        return f"{shown}. Save the network again, in one file and without a variant"
    subfolder = "" if of_network == folder else ", subfolder='unet'"
    load = f"UNet2DModel.from_pretrained({str(folder)!r}{subfolder}, use_safetensors=False)"
    return (
        f'{shown}. If you trust the file, convert it: python -c "from diffusers import UNet2DModel; {load}'
        f'.save_pretrained({str(of_network)!r})"'
    )


def _check_inside(path: Path, folder: Path) -> None:
    """Raises CheckpointError if the path is a link out of the folder.

    The files in the cache of the Hugging Face Hub are links from `snapshots` to `blobs` of the same repository.
    """
    root = folder.resolve()
    is_cache = root.parent.name == "snapshots"
    if not path.resolve().is_relative_to(root.parent.parent if is_cache else root) or not path.is_file():
        raise CheckpointError(f"{path} is not a file in {folder}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        content = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object of at most {MAX_JSON_BYTES >> 20} MiB")
    return content


def _check_network(path: Path, config: Mapping[str, Any]) -> tuple[tuple[int, int, int], int]:
    """Returns the image shape and the number of classes of a network. Raises CheckpointError for other networks."""
    size, channels = config.get("sample_size", 0), config.get("in_channels", 3)
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    widths = config.get("block_out_channels", [224])
    kind, num_classes = config.get("class_embed_type"), config.get("num_class_embeds")
    has_classes = num_classes is not None or kind is not None
    supported = {
        "_class_name": (config.get("_class_name") == NETWORK, NETWORK),
        "sample_size": (
            height == width and _is_integer(height, 1, LARGEST_IMAGE),
            f"1 to {LARGEST_IMAGE}, for square images",
        ),
        "in_channels": (channels in (1, 3), "1 or 3"),
        "out_channels": (
            config.get("out_channels", 3) == channels,
            f"{channels}, as in_channels; a learned variance is not supported",
        ),
        "block_out_channels": (
            isinstance(widths, list) and 1 <= len(widths) <= MAX_LEVELS and _are_integers(widths, 1, MAX_WIDTH),
            f"a list of 1 to {MAX_LEVELS} numbers from 1 to {MAX_WIDTH}",
        ),
        "layers_per_block": (_is_integer(config.get("layers_per_block", 2), 1, MAX_LAYERS), f"1 to {MAX_LAYERS}"),
        "time_embedding_type": (config.get("time_embedding_type", "positional") == "positional", "'positional'"),
        "class_embed_type": (kind in (None, "timestep"), "null or 'timestep'"),
        "num_class_embeds": (
            not has_classes or _is_integer(num_classes, 1, MAX_CLASSES),
            f"1 to {MAX_CLASSES} for a network with classes",
        ),
    }
    for key, (is_supported, expected) in supported.items():
        if not is_supported:
            raise CheckpointError(f"{path}: {key} is {ascii(config.get(key))[:80]}. Supported is {expected}")
    return (int(channels), int(height), int(height)), int(num_classes or 0)


def _are_integers(values: Iterable[object], lowest: int, highest: int) -> bool:
    return all(_is_integer(value, lowest, highest) for value in values)


def _is_integer(value: object, lowest: int, highest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def _check_memory(weights: Path) -> None:
    """Raises CheckpointError if the weights do not fit into the memory that is available."""
    needed, available = COPIES * weights.stat().st_size, _available_memory()
    if needed > available:
        shown = f"{needed / 2**30:.1f} GiB to be loaded, but {available / 2**30:.1f} GiB are available"
        raise CheckpointError(f"{weights} needs {shown}")


def _available_memory() -> float:
    """Returns the number of bytes that can be allocated. It is infinite where the system does not tell it."""
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def _check_size(files: _Files, network: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the network has far more values than the file, before memory is allocated for it."""
    with torch.device("meta"):
        needed = sum(tensor.numel() for tensor in network(**options).state_dict().values())
    with safe_open(files.weights, "pt") as file:
        given = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 # not a dict
    if needed > MOST_GROWTH * given:
        raise CheckpointError(f"{files.weights} has {given:,} values, but the network of {CONFIG} has {needed:,}")


def _load_network(files: _Files) -> nn.Module:
    """Returns the UNet2DModel with its weights. Raises CheckpointError if weights are missing or do not fit."""
    network = getattr(importlib.import_module("diffusers"), NETWORK)
    known = inspect.signature(network.__init__).parameters
    options = {key: value for key, value in _read_json(files.config).items() if not key.startswith("_")}
    unknown = sorted(key for key in options if key not in known)
    if unknown:
        raise CheckpointError(
            f"{files.config}: {unknown[0]!a} is unknown to the installed diffusers. Install a newer release of it"
        )
    try:
        _check_size(files, network, options)
        unet, info = network.from_pretrained(
            files.config.parent,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # True needs the package accelerate
            output_loading_info=True,
            torch_dtype=torch.float32,
        )
    except CheckpointError:
        raise
    except Exception as error:  # diffusers raises errors of many types for an invalid configuration
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{files.config.parent} cannot be loaded: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := info.get(kind):
            raise CheckpointError(
                f"{files.weights} does not fit {CONFIG}: {kind.replace('_', ' ')}, such as {found[0]}"
            )
    if not all(parameter.isfinite().all() for parameter in unet.parameters()):
        raise CheckpointError(f"{files.weights} has NaN or infinite values")
    network_with_weights: nn.Module = unet
    return network_with_weights
