"""Checkpoints: one safetensors file with the weights and all metadata that is needed to serve them.

Files are not trusted. `load` checks sizes, types and a digest before it uses the content.
"""

import base64
import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.files import write_atomically
from model.json_fields import build
from model.paths import timesteps_along, timesteps_of
from model.pixels import from_pixels, to_pixels
from model.prediction import Prediction, PredictionConfig
from model.sampler import Plan, make_plan, plan_through, sample
from model.schedule import Schedule, ScheduleConfig
from model.spec import (
    MAX_NAME_LENGTH,
    MNIST_SHAPE,
    MOST_DEFAULT_STEPS,
    SAMPLERS,
    Guidance,
    ModelSpec,
    Process,
    Sampler,
    looks_like_mnist,
)
from model.spec import SHIPPED as SHIPPED
from model.spec import SHIPPED_FAST as SHIPPED_FAST
from model.training_facts import training_facts
from model.unet import UNet, UNetConfig

FORMAT_VERSION = 1
MAX_FILE_BYTES = 2**28
METADATA_BYTES = 2**20  # reserved for everything but the weights
# A small file can describe a network that needs terabytes. These limits are checked before memory is allocated.
MAX_SIZES = {
    "image_size": 256,
    "num_classes": 1000,
    "num_steps": 10_000,
    "stem_patch": 64,
    "num_pairs": 16,
    "attention_heads": 64,
    "time_dim": 4096,
    "embed_dim": 4096,
}
MAX_LEVELS, MAX_WIDTH = 8, 4096
MAX_ACTIVATIONS = 2**22  # limit of values per image in the features of one level
MAX_ATTENTION_POSITIONS = 1024
MAX_TABLE = 2**26  # limit of values in the result of UNet.condition_table()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # permitted types of stored weights
METADATA_KEY = "unfog"
MAX_HEADER_BYTES = 1 << 20
Normalisation = Literal["auto", "mnist", "none"]
# The oldest files lack prediction, steps, training and guidance_by_sampler, so those are optional.
REQUIRED = ("unet", "schedule", "class_names", "guidance", "samplers", "probe")


class CheckpointError(Exception):
    """The file cannot be loaded. The message is one line with the path and the reason."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Options of the probe image, which is stored with the weights.

    At start, the service generates the image again and compares it, which detects wrong kernels.
    """

    digit: int = 7
    seed: int = 2**53 - 1
    num_steps: int = 10
    sampler: Sampler = "ddim"


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Metadata of a checkpoint. Raises ValueError if its parts contradict each other or the network is too large."""

    unet: UNetConfig
    schedule: ScheduleConfig
    prediction: PredictionConfig = PredictionConfig()
    class_names: tuple[str, ...] = tuple("0123456789")
    guidance: Guidance = Guidance()  # recommended guidance of all other samplers
    guidance_by_sampler: dict[Sampler, Guidance] = field(default_factory=dict)  # recommended guidance of these samplers
    samplers: tuple[Sampler, ...] = SAMPLERS  # permitted samplers; the first is recommended
    steps: tuple[int, ...] = ()  # permitted numbers of steps, the first is recommended; empty = all up to T
    training: dict[str, Any] = field(default_factory=dict)  # preset, data, epochs, seed, losses, evaluation
    probe: Probe = Probe()
    # How pictures become images. mnist: drawings are normalised as in MNIST. none: only resized. auto: mnist for grey
    # digits of 28 x 28 pixels, because the oldest files lack this field.
    normalisation: Normalisation = "auto"

    def __post_init__(self) -> None:
        _check_size(self.unet)
        T, num_classes, probe = self.schedule.num_steps, self.unet.num_classes, self.probe
        if self.unet.num_steps != T:
            raise ValueError(f"the schedule has {T} steps, but the network has {self.unet.num_steps}")
        Schedule(self.schedule)  # raises ValueError if a sampler could not use it
        check_names(self.class_names, num_classes)
        if self.normalisation == "mnist" and self.image_shape != MNIST_SHAPE:
            raise ValueError("normalisation can be mnist only for grey images of 28x28 pixels")
        if not self.samplers or not {*self.samplers, probe.sampler} <= set(SAMPLERS):
            raise ValueError(f"samplers and probe.sampler must be one or more of {', '.join(SAMPLERS)}")
        most_steps = min(T, MOST_DEFAULT_STEPS)
        if not all(isinstance(num_steps, int) and 1 <= num_steps <= most_steps for num_steps in self.steps):
            raise ValueError(f"steps must be integers from 1 to {most_steps}")
        if not isinstance(self.training.get("label_drop", 0), int | float):
            raise ValueError("training.label_drop must be a number")
        self._check_guidance()
        if not (0 <= probe.digit < num_classes and 1 <= probe.num_steps <= T and 0 <= probe.seed < 2**53):
            raise ValueError(f"probe needs a digit 0 to {num_classes - 1}, num_steps 1 to {T} and a seed below 2^53")

    def _check_guidance(self) -> None:
        if not set(self.guidance_by_sampler) <= set(SAMPLERS):
            raise ValueError(f"the keys of guidance_by_sampler must be samplers: {', '.join(SAMPLERS)}")
        T, every = self.schedule.num_steps, (self.guidance, *self.guidance_by_sampler.values())
        if any(guidance.start > T for guidance in every):
            raise ValueError(f"guidance must start at a timestep of the schedule: at most {T}")
        if not self.guidable and any(guidance.scale != 1 for guidance in every):
            raise ValueError("a guidance scale other than 1 needs training.label_drop above 0")

    @property
    def spec(self) -> ModelSpec:
        """The part of the configuration that limits requests. It can be used without torch."""
        return ModelSpec(
            class_names=self.class_names,
            image_shape=self.image_shape,
            schedule=Schedule(self.schedule),
            steps=self.steps,
            samplers=self.samplers,
            guidance={sampler: self.guidance_of(sampler) for sampler in self.samplers},
            guidable=self.guidable,
            training=training_facts(self.training),
            normalises_drawings=self.normalises_drawings,
        )

    @property
    def normalises_drawings(self) -> bool:
        """True if drawings are normalised as in MNIST."""
        is_like_mnist = looks_like_mnist(self.image_shape, self.class_names)
        return self.normalisation == "mnist" or (self.normalisation == "auto" and is_like_mnist)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.unet.image_channels, self.unet.image_size, self.unet.image_size

    def guidance_of(self, sampler: Sampler) -> Guidance:
        """Returns the recommended guidance of this sampler. Requests with another scale use its interval too."""
        return self.guidance_by_sampler.get(sampler, self.guidance)

    @property
    def guidable(self) -> bool:
        """True if the network supports guidance, which needs training with dropped labels."""
        return bool(self.training.get("label_drop", 0) > 0)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint. `network` is called with (x_t, t, y). It is in evaluation mode, float32 and on the CPU."""

    network: UNet
    schedule: Schedule
    prediction: Prediction
    config: CheckpointConfig
    sha256: str  # digest of the file
    weights_sha256: str  # digest of the weights without the metadata
    probe_image: Tensor  # (C, H, W) in [-1, 1], quantised to 8 bits

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.config.image_shape

    @property
    def spec(self) -> ModelSpec:
        """The part of the configuration that limits requests."""
        return self.config.spec

    @property
    def probe(self) -> Probe:
        """The options of the probe image."""
        return self.config.probe

    @property
    def probe_path(self) -> tuple[int, ...]:
        """The path of the probe image: an empty one, for the whole reverse process."""
        return ()

    @property
    def architecture(self) -> UNetConfig:
        """The configuration of the network. Networks with the same one take the same time."""
        return self.config.unet

    def plan(self, process: Process, num_steps: int, path: Sequence[int] = ()) -> Plan:
        """Returns the plan for a path. For an empty path, returns the plan for `num_steps` steps from T to 0."""
        if path or process not in SAMPLERS:
            return plan_through(self.schedule, process, path)
        return make_plan(self.schedule, process, num_steps)

    def timesteps(self, sampler: Sampler, num_steps: int, path: Sequence[int] = ()) -> list[int]:
        """Returns the timestep of each step of a sampler, with the arguments of `plan`."""
        return (timesteps_along(path) if path else timesteps_of(self.schedule, sampler, num_steps))[:-1]

    def guidance_of(self, sampler: Sampler) -> Guidance:
        """Returns the recommended guidance of this sampler."""
        return self.config.guidance_of(sampler)


def draw_probe(network: UNet, config: CheckpointConfig) -> Tensor:
    """Generates the probe image with this network. Returns x_0 (C, H, W) in [-1, 1]."""
    probe, device = config.probe, next(network.parameters()).device
    x_0 = sample(
        network,
        Schedule(config.schedule),
        torch.tensor([probe.digit], device=device),
        seed=torch.tensor([probe.seed], device=device),
        index=torch.tensor([0], device=device),
        image_shape=config.image_shape,
        sampler=probe.sampler,
        num_steps=probe.num_steps,
        guidance=config.guidance_of(probe.sampler),
        prediction=Prediction(config.prediction, Schedule(config.schedule)),
        null_label=network.null_label,
    )
    return x_0[0]


def save(path: Path, network: UNet, config: CheckpointConfig, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a checkpoint atomically: after a crash the file is the old one or the complete new one.

    Weights are stored as `dtype` and loaded as float32. float16 halves the size of the file. Its mantissa has three
    bits more than that of bfloat16, the usual type of the service. Raises OSError if the file cannot be written.
    """
    tensors = {
        name: t.detach().cpu().to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, t in network.state_dict().items()
    }
    stored = copy.deepcopy(network)
    stored.load_state_dict(tensors)  # the probe image must match the weights after loading
    image = to_pixels(draw_probe(stored, config).cpu())
    metadata = {
        "format_version": FORMAT_VERSION,
        "probe_image": base64.b64encode(image.numpy().tobytes()).decode(),
        **dataclasses.asdict(config),
    }
    metadata["digest"] = _digest(tensors, metadata)
    write_atomically(path, serialize(tensors, {METADATA_KEY: json.dumps(metadata)}))


def load(path: Path) -> Checkpoint:
    """Loads and verifies a checkpoint. Raises CheckpointError if the file cannot be read or is not valid.

    Sizes are checked before memory is allocated.
    """
    content = _read(path)
    tensors, metadata = _deserialize(path, content)
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        shown = ascii(version).strip("'")[:20] if isinstance(version, int | float | str | None) else "unknown"
        raise CheckpointError(f"{path} has format version {shown}, but this release reads version {FORMAT_VERSION}")
    _check_tensors(path, tensors, metadata)
    try:
        del metadata["format_version"]
        probe_bytes = _decode(metadata.pop("probe_image", None))
        config = build(CheckpointConfig, metadata, required=REQUIRED)
        _check_shapes(config.unet, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        num_bytes = math.prod(config.image_shape)
        if len(probe_bytes) != num_bytes:
            raise ValueError(f"the probe image has {len(probe_bytes)} bytes, but the network needs {num_bytes}")
    except ValueError as error:
        raise CheckpointError(f"{path} is not a checkpoint of unfog: {error}") from error
    network, schedule = UNet(config.unet), Schedule(config.schedule)
    network.load_state_dict(tensors)
    network.eval().requires_grad_(False)
    prediction = Prediction(config.prediction, schedule)
    probe_image = from_pixels(torch.frombuffer(bytearray(probe_bytes), dtype=torch.uint8).reshape(config.image_shape))
    sha256 = hashlib.sha256(content).hexdigest()
    return Checkpoint(network, schedule, prediction, config, sha256, weights_sha256(network), probe_image)


def read_config(path: Path) -> CheckpointConfig:
    """Reads only the metadata of a checkpoint, which takes milliseconds. Raises CheckpointError if that fails.

    The weights are neither read nor verified. Use `load` to generate images.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
        metadata = json.loads(json.loads(header)["__metadata__"][METADATA_KEY])
        for name in ("digest", "probe_image", "format_version"):
            metadata.pop(name)
        return build(CheckpointConfig, metadata, required=REQUIRED)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of unfog") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            is_large = os.fstat(file.fileno()).st_size > MAX_FILE_BYTES
            content = b"" if is_large else file.read(MAX_FILE_BYTES + 1)  # the size of a pipe or a device is unknown
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if is_large or len(content) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is larger than the limit of {MAX_FILE_BYTES >> 20} MiB")
    return content


def _deserialize(path: Path, content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = deserialize(content)
        header_end = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(json.loads(content[8:header_end])["__metadata__"][METADATA_KEY])
        if not isinstance(metadata, dict):
            raise TypeError("metadata must be an object")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file") from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # RuntimeError includes RecursionError
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of unfog") from error
    return tensors, metadata


def _check_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Checks the digest, the types and that all values are finite. Removes the digest from `metadata`."""
    digest = metadata.pop("digest", None)
    try:
        is_intact = digest == _digest(tensors, metadata)
    except RecursionError as error:
        raise CheckpointError(f"{path} is not a checkpoint of unfog: its metadata is nested too deeply") from error
    if not is_intact:
        raise CheckpointError(f"{path} is damaged: its content does not match the digest stored with it")
    if not all(tensor.dtype in DTYPES for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a checkpoint of unfog: weights must be float32, float16 or bfloat16")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise CheckpointError(f"{path} has NaN or infinite values in its weights")


def _decode(probe_image: object) -> bytes:
    if not isinstance(probe_image, str):
        raise ValueError("probe_image must be base64")
    try:
        return base64.b64decode(probe_image, validate=True)
    except ValueError as error:  # the message of the original error may quote the input
        raise ValueError("probe_image must be base64") from error


def check_names(names: tuple[str, ...], num_classes: int) -> None:
    """Raises ValueError unless each class has a name that a prompt can contain."""
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} class names, but the network has {num_classes} classes")
    if unusable := [name for name in names if not name.strip() or not name.isprintable()]:
        raise ValueError(f"class names must be printable and not blank, but one is {unusable[0]!a}")
    if any(len(name) > MAX_NAME_LENGTH for name in names):
        raise ValueError(f"class names must have at most {MAX_NAME_LENGTH} characters")
    if len(set(names)) < num_classes:
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"class names must differ, but {twice!a} occurs more than once")


def _check_size(unet: UNetConfig) -> None:
    """Raises ValueError if the architecture exceeds a size limit, or if no PNG file can store its images."""
    if unet.image_channels not in (1, 3):
        raise ValueError(f"unet.image_channels must be 1 (grey) or 3 (colour), got {unet.image_channels}")
    for name, limit in MAX_SIZES.items():
        if getattr(unet, name) > limit:
            raise ValueError(f"unet.{name} must be at most {limit}, got {getattr(unet, name)}")
    if len(unet.widths) > MAX_LEVELS or max(unet.widths) > MAX_WIDTH:
        raise ValueError(f"unet.widths must be at most {MAX_LEVELS} numbers, each at most {MAX_WIDTH}")
    edges = [unet.image_size // unet.stem_patch // 2**level for level in range(len(unet.widths))]
    if any(edge**2 * width > MAX_ACTIVATIONS for edge, width in zip(edges, unet.widths, strict=True)):
        raise ValueError(f"unet.widths: a level has more than {MAX_ACTIVATIONS} values per image")
    if unet.attention_heads and edges[-1] ** 2 > MAX_ATTENTION_POSITIONS:
        raise ValueError(f"unet.attention_heads: the last level has more than {MAX_ATTENTION_POSITIONS} positions")


class _WithoutCompiler(TorchFunctionMode):
    """Replaces calls that import torch's compiler on the device meta. The import takes a second of each start.

    Functions of torch.nn.init do nothing, and arange uses the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs | {"device": "cpu"}) if func is torch.arange else func(*args, **kwargs)


def _check_shapes(unet: UNetConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if the tensors do not match the network, or if its conditioning table is too large."""
    with torch.device("meta"), _WithoutCompiler():  # on the device meta, tensors need no memory
        network = UNet(unet)
    for name, tensor in network.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise ValueError(f"tensor {name} {found}, but the network needs {tuple(tensor.shape)}")
    if len(shapes) > len(network.state_dict()):
        raise ValueError(f"the network has {len(network.state_dict())} tensors, but the file has {len(shapes)}")
    _check_table(network)


def check_network(unet: UNetConfig) -> None:
    """Raises ValueError if a network is too large for a checkpoint, before it needs memory."""
    with torch.device("meta"), _WithoutCompiler():
        network = UNet(unet)
    _check_table(network)
    num_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    if num_bytes > MAX_FILE_BYTES - METADATA_BYTES:
        raise ValueError(f"the weights need {num_bytes >> 20} MiB, the limit is {MAX_FILE_BYTES >> 20} MiB")


def _check_table(network: UNet) -> None:
    unet, width = network.config, network.condition_proj.out_features
    num_values = (unet.num_steps + 1) * (unet.num_classes + 1) * width
    if num_values > MAX_TABLE:
        most = MAX_TABLE // ((unet.num_steps + 1) * width) - 1
        raise ValueError(
            f"the conditioning table (steps x classes x widths) has {num_values} values, the limit is {MAX_TABLE}. At "
            f"most {most} classes are possible with these widths"
        )


def weights_sha256(network: UNet, stored_as: torch.dtype = torch.float32) -> str:
    """Returns the digest of the weights after rounding them to `stored_as`, as `save` and `load` do."""
    return _digest({name: tensor.to(stored_as).float() for name, tensor in network.state_dict().items()}, {})


def _digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Returns the digest of tensors and metadata. The metadata must not contain a digest yet."""
    return tensors_sha256(tensors, json.dumps(metadata, sort_keys=True).encode())


def tensors_sha256(tensors: dict[str, Tensor], first: bytes = b"") -> str:
    """Returns the SHA-256 of `first` and of each CPU tensor (name, dtype, shape and content), sorted by name."""
    digest = hashlib.sha256(first)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
