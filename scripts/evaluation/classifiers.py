"""Small classifiers for the evaluation. They are independent of the diffusion networks and of each other.

The judge gives the recognition accuracy of published tables. The extractor gives the features for distances between
sets of images, and the recognition accuracy by which settings are chosen. The fog judge was trained on noisy digits and
measures up to which noise level a digit can be recognised. The weights that ship with unfog are for MNIST.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from model.files import write_atomically
from model.spec import DIGITS
from scripts.common.data.source import MAX_CLASSES
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES

WEIGHTS = Path(__file__).parent / "weights"
METADATA_KEY = "unfog_classifier"
BATCH_SIZE = 500
MOST_CHANNELS = 512  # of a layer, and pixels of a side


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a classifier: (C, H, W) of its images, its number K of classes, and channels of its first layer."""

    image: tuple[int, int, int] = (1, 28, 28)
    num_classes: int = NUM_CLASSES
    width: int = 32


DIGITS_SHAPE = Shape()


class Classifier(nn.Module):
    """Base class: images (B, C, H, W) in [0, 1] -> features (B, F) -> logits (B, K)."""

    num_features = 128

    def __init__(self, body: nn.Sequential, dropout: float, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.num_features, shape.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns the inputs of the head, (B, F)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, (B, K)."""
        return self.head(self.dropout(self.features(x)))


class Residual(nn.Module):
    """Adds two convolutions to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*_conv(channels, channels, 3), *_conv(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Returns x + f(x), (B, C, H, W)."""
        return x + self.convolutions(x)


class Judge(Classifier):
    """Five convolutions with batch norm, followed by global average pooling.

    For images in colour, two of them are residual pairs, because photographs are harder to recognise than digits.
    """

    def __init__(self, shape: Shape = DIGITS_SHAPE) -> None:
        channels, width = shape.image[0], shape.width
        self.num_features = 4 * width

        def second(channels_within: int) -> tuple[nn.Module, ...]:
            return _conv(channels_within, channels_within, 3) if channels == 1 else (Residual(channels_within),)

        body = nn.Sequential(
            *_conv(channels, width, 5),
            nn.MaxPool2d(2),
            *_conv(width, 2 * width, 3),
            *second(2 * width),
            nn.MaxPool2d(2),
            *_conv(2 * width, 4 * width, 3),
            *second(4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        super().__init__(body, 0.2, shape)


class Extractor(Classifier):
    """Like LeNet-5 (LeCun 1998), with batch norm: two convolutions and a linear layer that keeps positions."""

    def __init__(self, shape: Shape = DIGITS_SHAPE) -> None:
        (channels, height, _), width = shape.image, shape.width
        body = nn.Sequential(
            *_conv(channels, width, 5),
            nn.MaxPool2d(2),
            *_conv(width, 2 * width, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * (height // 4) ** 2, self.num_features, bias=False),
            nn.BatchNorm1d(self.num_features),
            nn.ReLU(inplace=True),
        )
        super().__init__(body, 0.3, shape)


KINDS: dict[str, Callable[[Shape], Classifier]] = {"judge": Judge, "extractor": Extractor, "fog_judge": Judge}


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained classifier and its metadata."""

    network: Classifier  # float32, in evaluation mode
    facts: dict[str, Any]  # accuracy on real test digits, and training options
    sha256: str  # digest of the file

    @property
    def accuracy(self) -> float:
        """The accuracy on real test images, measured after the training."""
        return float(self.facts["test_accuracy"])


@torch.inference_mode()
def features_of(network: Classifier, images: Tensor) -> Tensor:
    """Returns the features (N, F) of uint8 images (N, C, H, W). Raises ScriptError for images of another shape."""
    if images.dtype != torch.uint8 or images.shape[1:] != network.shape.image:
        needed, kind = "x".join(map(str, network.shape.image)), f"{images.dtype} of {tuple(images.shape[1:])}"
        raise ScriptError(f"The classifier needs uint8 images of {needed}, not {kind}")
    return torch.cat([network.features(batch / 255) for batch in images.split(BATCH_SIZE)])


@torch.inference_mode()
def probabilities_of(network: Classifier, images: Tensor) -> Tensor:
    """Returns the class probabilities (N, K) of uint8 images (N, C, H, W)."""
    return network.head(features_of(network, images)).softmax(dim=1)


def recognise(network: Classifier, images: Tensor) -> Tensor:
    """Returns the most probable label of each image: uint8 (N, C, H, W) -> int64 (N,)."""
    return probabilities_of(network, images).argmax(dim=1)


def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images that are recognised as their labels."""
    return (recognise(network, images) == labels).double().mean().item()


def save_classifier(path: Path, kind: str, network: Classifier, facts: dict[str, Any]) -> None:
    """Atomically writes weights and metadata to a safetensors file."""
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in network.state_dict().items()
    }
    metadata = {"kind": kind, **facts, **({} if network.shape == DIGITS_SHAPE else {"shape": asdict(network.shape)})}
    write_atomically(path, serialize(tensors, {METADATA_KEY: json.dumps(metadata)}))


def load_classifier(kind: str, path: Path | None = None) -> Trained:
    """Loads a classifier from the file, or the shipped one for None. Raises ScriptError for a wrong or damaged file."""
    path = path or WEIGHTS / f"{kind}.safetensors"
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA_KEY])
            if facts.pop("kind") != kind:
                raise KeyError(kind)
            shape = _shape(facts.pop("shape", None))
            names = facts.get("class_names", DIGITS)
            if len(names) != shape.num_classes or not all(isinstance(name, str) for name in names):
                raise ValueError(names)
            network = KINDS[kind](shape)
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        if not math.isfinite(float(facts["test_accuracy"])):
            raise ValueError(facts["test_accuracy"])
    except OSError as error:
        raise ScriptError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        message = f"{path} is not a {kind}. Train one with python -m scripts.train_classifiers {kind} --out {path}"
        raise ScriptError(message) from error
    return Trained(network.eval().requires_grad_(False), facts, sha256)


def _shape(values: dict[str, Any] | None) -> Shape:
    if values is None:
        return DIGITS_SHAPE
    channels, height, width = (int(each) for each in values["image"])
    shape = Shape((channels, height, width), int(values["num_classes"]), int(values["width"]))
    if max(channels, height, width, shape.width) > MOST_CHANNELS or shape.num_classes > MAX_CLASSES:
        raise ValueError(shape)  # before tensors of this size are allocated
    return shape
