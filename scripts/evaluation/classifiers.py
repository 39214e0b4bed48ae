"""Small digit classifiers for the evaluation. They are independent of the diffusion networks and of each other.

The judge gives the recognition accuracy of published tables. The extractor gives the features for distances between
sets of images, and the recognition accuracy by which settings are chosen. The fog judge was trained on noisy digits and
measures up to which noise level a digit can be recognised.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from model.files import write_atomically
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES

WEIGHTS = Path(__file__).parent / "weights"
METADATA_KEY = "unfog_classifier"
BATCH_SIZE = 500


class Classifier(nn.Module):
    """Base class: images (B, 1, 28, 28) in [0, 1] -> features (B, 128) -> logits (B, 10)."""

    num_features = 128

    def __init__(self, body: nn.Sequential, dropout: float) -> None:
        super().__init__()
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.num_features, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Returns the inputs of the head, (B, 128)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, (B, 10)."""
        return self.head(self.dropout(self.features(x)))


class Judge(Classifier):
    """Five convolutions with batch norm, followed by global average pooling."""

    def __init__(self) -> None:
        body = nn.Sequential(
            *_conv(1, 32, 5),
            nn.MaxPool2d(2),
            *_conv(32, 64, 3),
            *_conv(64, 64, 3),
            nn.MaxPool2d(2),
            *_conv(64, 128, 3),
            *_conv(128, self.num_features, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        super().__init__(body, dropout=0.2)


class Extractor(Classifier):
    """Like LeNet-5 (LeCun 1998), with batch norm: two convolutions and a linear layer that keeps positions."""

    def __init__(self) -> None:
        body = nn.Sequential(
            *_conv(1, 32, 5),
            nn.MaxPool2d(2),
            *_conv(32, 64, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 7 * 7, self.num_features, bias=False),
            nn.BatchNorm1d(self.num_features),
            nn.ReLU(inplace=True),
        )
        super().__init__(body, dropout=0.3)


KINDS: dict[str, Callable[[], Classifier]] = {"judge": Judge, "extractor": Extractor, "fog_judge": Judge}


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
        """The accuracy on MNIST's 10,000 test digits, measured after the training."""
        return float(self.facts["test_accuracy"])


@torch.inference_mode()
def features_of(network: Classifier, images: Tensor) -> Tensor:
    """Returns the features (N, 128) of uint8 images (N, 1, 28, 28). Raises ScriptError for other images."""
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28):
        kind = f"{images.dtype} of {tuple(images.shape[1:])}"
        raise ScriptError(f"Classifiers need uint8 images of 1x28x28, not {kind}")
    return torch.cat([network.features(batch / 255) for batch in images.split(BATCH_SIZE)])


@torch.inference_mode()
def probabilities_of(network: Classifier, images: Tensor) -> Tensor:
    """Returns the class probabilities (N, 10) of uint8 images (N, 1, 28, 28)."""
    return network.head(features_of(network, images)).softmax(dim=1)


def recognise(network: Classifier, images: Tensor) -> Tensor:
    """Returns the most probable digit of each image: uint8 (N, 1, 28, 28) -> int64 (N,)."""
    return probabilities_of(network, images).argmax(dim=1)


def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images that are recognised as their labels."""
    return (recognise(network, images) == labels).double().mean().item()


def save_classifier(path: Path, kind: str, network: Classifier, facts: dict[str, Any]) -> None:
    """Atomically writes weights and metadata to a safetensors file."""
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in network.state_dict().items()
    }
    write_atomically(path, serialize(tensors, {METADATA_KEY: json.dumps({"kind": kind, **facts})}))


def load_classifier(kind: str, path: Path | None = None) -> Trained:
    """Loads a classifier from the file, or the shipped one for None. Raises ScriptError for a wrong or damaged file."""
    path = path or WEIGHTS / f"{kind}.safetensors"
    network = KINDS[kind]()
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA_KEY])
            if facts.pop("kind") != kind:
                raise KeyError(kind)
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        float(facts["test_accuracy"])
    except OSError as error:
        raise ScriptError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        message = f"{path} is not a {kind}. Train one with python -m scripts.train_classifiers {kind}"
        raise ScriptError(message) from error
    return Trained(network.eval().requires_grad_(False), facts, sha256)
