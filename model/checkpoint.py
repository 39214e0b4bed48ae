"""Checkpoints: one safetensors file that holds the weights to serve and all that is needed to serve them."""

import base64
import binascii
import copy
import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from model.prediction import Prediction, PredictionConfig
from model.sampler import SAMPLERS, Guidance, Sampler, sample
from model.schedule import Schedule, ScheduleConfig
from model.unet import UNet, UNetConfig

FORMAT_VERSION = 1
MOST_STEPS = 100  # that are ever asked for
SHIPPED = Path(__file__).parent / "weights" / "default.safetensors"
SHIPPED_FAST = SHIPPED.with_name("fast.safetensors")  # its student
METADATA_KEY = "unfog"
MAX_HEADER_BYTES = 1 << 20


class CheckpointError(Exception):
    """The file cannot be served; the message is one sentence for the person who named it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A picture that the weights are known to draw: whoever loads them can see that the machine draws it too."""

    digit: int = 7
    seed: int = 2**53 - 1
    num_steps: int = 10
    sampler: Sampler = "ddim"


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """The metadata: what the tensors alone do not say."""

    unet: UNetConfig
    schedule: ScheduleConfig
    prediction: PredictionConfig = PredictionConfig()
    class_names: tuple[str, ...] = tuple("0123456789")
    guidance: Guidance = Guidance()  # the recommended one
    guidance_by_sampler: dict[Sampler, Guidance] = field(default_factory=dict)  # of those that want another
    samplers: tuple[Sampler, ...] = SAMPLERS  # those permitted, the recommended one first
    steps: tuple[int, ...] = ()  # likewise numbers of steps; empty = all up to T
    training: dict[str, Any] = field(default_factory=dict)  # preset, data, epochs, seed, losses, evaluation
    probe: Probe = Probe()

    def __post_init__(self) -> None:
        """ValueError where the parts contradict each other."""
        T, probe = self.schedule.num_steps, self.probe
        if self.unet.num_steps != T or len(self.class_names) != self.unet.num_classes:
            raise ValueError("network, schedule and class names do not fit together")
        if not isinstance(self.training, dict):
            raise ValueError("training must be a mapping")
        if not self.samplers or not {*self.samplers, probe.sampler} <= set(SAMPLERS):
            raise ValueError(f"samplers must be among {', '.join(SAMPLERS)}")
        if not all(isinstance(num_steps, int) and 1 <= num_steps <= min(T, MOST_STEPS) for num_steps in self.steps):
            raise ValueError(f"steps must be integers within the schedule, and at most {MOST_STEPS}")
        if not isinstance(self.training.get("label_drop", 0), int | float):
            raise ValueError("training.label_drop must be a number")
        if not set(self.guidance_by_sampler) <= set(SAMPLERS):
            raise ValueError(f"guidance_by_sampler must be of samplers among {', '.join(SAMPLERS)}")
        if not self.guidable and any(g.scale != 1 for g in (self.guidance, *self.guidance_by_sampler.values())):
            raise ValueError("guidance needs training.label_drop above 0")
        if not (0 <= probe.digit < self.unet.num_classes and 1 <= probe.num_steps <= T and 0 <= probe.seed < 2**53):
            raise ValueError("the probe asks for what the network cannot draw")

    @property
    def recommended_steps(self) -> int:
        """How many steps are made where nobody asks for a number."""
        return self.steps[0] if self.steps else min(self.schedule.num_steps, MOST_STEPS)

    def guidance_of(self, sampler: Sampler) -> Guidance:
        """The recommended one, and the only interval in which this sampler's rows are ever guided."""
        return self.guidance_by_sampler.get(sampler, self.guidance)

    @property
    def guidable(self) -> bool:
        """Whether labels were dropped in training: without that, guidance has nothing to lean on."""
        return bool(self.training.get("label_drop", 0) > 0)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint: `network` is called as (x_t, t, y), in evaluation mode, float32, on the CPU."""

    network: UNet
    schedule: Schedule
    prediction: Prediction
    config: CheckpointConfig
    sha256: str  # of the file
    weights_sha256: str  # of the weights alone, which draw the same whatever stands beside them
    probe_image: Tensor  # (C, H, W) in [-1, 1], quantised to 8 bits

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        unet = self.config.unet
        return unet.image_channels, unet.image_size, unet.image_size


def draw_probe(network: UNet, config: CheckpointConfig) -> Tensor:
    """Draws the probe's picture with the network as it is, (C, H, W) in [-1, 1]."""
    probe, device = config.probe, next(network.parameters()).device
    x_0 = sample(
        network,
        Schedule(config.schedule),
        torch.tensor([probe.digit], device=device),
        seed=torch.tensor([probe.seed], device=device),
        index=torch.tensor([0], device=device),
        image_shape=(config.unet.image_channels, config.unet.image_size, config.unet.image_size),
        sampler=probe.sampler,
        num_steps=probe.num_steps,
        guidance=config.guidance_of(probe.sampler),
        prediction=Prediction(config.prediction, Schedule(config.schedule)),
        null_label=network.null_label,
    )
    return x_0[0]


def save(path: Path, network: UNet, config: CheckpointConfig, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes the checkpoint atomically: a crash leaves the old file or the new one, never a part.

    `dtype` is what the weights are stored in; float16 halves the file and still has three bits of
    mantissa more than the bfloat16 that serves. They are loaded as float32 again.
    """
    tensors = {
        name: t.detach().cpu().to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, t in network.state_dict().items()
    }
    stored = copy.deepcopy(network)
    stored.load_state_dict(tensors)  # what a reader will have: the known picture is drawn with the same weights
    image = ((draw_probe(stored, config).cpu() + 1) * 127.5).round().to(torch.uint8)
    metadata = {
        "format_version": FORMAT_VERSION,
        "probe_image": base64.b64encode(image.numpy().tobytes()).decode(),
        **dataclasses.asdict(config),
    }
    metadata["digest"] = _digest(tensors, metadata)
    write_atomically(path, serialize(tensors, {METADATA_KEY: json.dumps(metadata)}))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside the target and renames over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load(path: Path) -> Checkpoint:
    """Loads and verifies a checkpoint whole; CheckpointError, in one sentence, for whatever is wrong with it."""
    tensors, metadata, sha256 = _read(path)
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this release reads version {FORMAT_VERSION}")
    if metadata.pop("digest", None) != _digest(tensors, metadata):
        raise CheckpointError(f"{path} is damaged: its content does not match the digest stored with it")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise CheckpointError(f"{path} has NaN or infinite values in its weights")
    try:
        probe_bytes = base64.b64decode(metadata.pop("probe_image"), validate=True)
        del metadata["format_version"]
        config = _parse_config(metadata)
        network, schedule = UNet(config.unet), Schedule(config.schedule)
        network.load_state_dict(tensors)
        shape = (config.unet.image_channels, config.unet.image_size, config.unet.image_size)
        probe_image = torch.frombuffer(bytearray(probe_bytes), dtype=torch.uint8).reshape(shape) / 127.5 - 1
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, binascii.Error) as error:
        raise CheckpointError(f"{path} is not a checkpoint of unfog: its metadata and tensors disagree") from error
    prediction = Prediction(config.prediction, schedule)
    network.eval().requires_grad_(False)
    return Checkpoint(network, schedule, prediction, config, sha256, weights_sha256(network), probe_image)


def read_config(path: Path) -> CheckpointConfig:
    """Reads the configuration from the file's header alone, in milliseconds; CheckpointError if it cannot.

    The weights are neither read nor verified: use `load` for a checkpoint that is to draw.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
        metadata = json.loads(json.loads(header)["__metadata__"][METADATA_KEY])
        for name in ("digest", "probe_image", "format_version"):
            metadata.pop(name)
        return _parse_config(metadata)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of unfog") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    try:
        content = path.read_bytes()
        tensors = deserialize(content)
        header_end = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(json.loads(content[8:header_end])["__metadata__"][METADATA_KEY])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of unfog") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of unfog")
    return tensors, metadata, hashlib.sha256(content).hexdigest()


def _parse_config(metadata: dict[str, Any]) -> CheckpointConfig:
    """Unknown fields raise TypeError: a newer writer is noticed, not half understood. So do missing ones, but for
    those that came later: the first files have no prediction, no steps and no sampler's own guidance."""
    metadata["unet"]["widths"] = tuple(metadata["unet"]["widths"])
    return CheckpointConfig(
        unet=UNetConfig(**metadata.pop("unet")),
        schedule=ScheduleConfig(**metadata.pop("schedule")),
        prediction=PredictionConfig(**metadata.pop("prediction", {})),
        class_names=tuple(metadata.pop("class_names")),
        guidance=Guidance(**metadata.pop("guidance")),
        guidance_by_sampler={name: Guidance(**own) for name, own in metadata.pop("guidance_by_sampler", {}).items()},
        samplers=tuple(metadata.pop("samplers")),
        steps=tuple(metadata.pop("steps", ())),
        probe=Probe(**metadata.pop("probe")),
        **metadata,
    )


def weights_sha256(network: UNet, stored_as: torch.dtype = torch.float32) -> str:
    """Of the weights as they are once loaded again from a file that stores them in this precision."""
    return _digest({name: tensor.to(stored_as).float() for name, tensor in network.state_dict().items()}, {})


def _digest(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Of both, but for a digest that stands in the metadata."""
    return tensors_sha256(tensors, json.dumps(metadata, sort_keys=True).encode())


def tensors_sha256(tensors: dict[str, Tensor], first: bytes = b"") -> str:
    """Of these bytes, then of each tensor on the CPU, in the order of their names: name, type, shape, content."""
    digest = hashlib.sha256(first)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
