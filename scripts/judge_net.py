"""The judge: a small convolutional network that tells digits apart, independent of the networks that draw them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from model.checkpoint import write_atomically

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
METADATA_KEY = "unfog_judge"
NUM_CLASSES = 10
NUM_FEATURES = 128
BATCH_SIZE = 500


class JudgeError(Exception):
    """The judge cannot be loaded or cannot judge these images; one sentence."""


class JudgeNet(nn.Module):
    """Five convolutions with batch norm, the mean of the last one's maps, and a linear layer over it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(1, 32, 5),
            nn.MaxPool2d(2),
            *_conv(32, 64, 3),
            *_conv(64, 64, 3),
            nn.MaxPool2d(2),
            *_conv(64, 128, 3),
            *_conv(128, NUM_FEATURES, 3),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) in [0, 1] -> what the head sees of them, (B, NUM_FEATURES)."""
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) in [0, 1] -> logits (B, 10)."""
        return self.head(self.dropout(self.features(x)))


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


@dataclass(frozen=True, slots=True)
class Judge:
    """A trained judge: its network, float32 and in evaluation mode, and what is known of it."""

    network: JudgeNet
    facts: dict[str, Any]  # accuracy on real test digits, how it was trained
    sha256: str  # of the file

    @property
    def accuracy(self) -> float:
        """The share of MNIST's 10,000 test digits that it recognises, measured when it was trained."""
        return float(self.facts["test_accuracy"])


@torch.inference_mode()
def recognise(network: JudgeNet, images: Tensor) -> Tensor:
    """The digit seen in each image: uint8 (N, 1, 28, 28) -> int64 (N,); JudgeError for images of another kind."""
    return _logits(network, images).argmax(dim=1)


@torch.inference_mode()
def accuracy_and_loss(network: JudgeNet, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The share of images that are recognised as their labels, and the mean cross-entropy."""
    logits = _logits(network, images)  # (N, 10)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, nn.functional.cross_entropy(logits, labels).item()


def _logits(network: JudgeNet, images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.shape[1:] != (1, 28, 28):
        raise JudgeError(f"the judge sees 8-bit images of 1x28x28, not {images.dtype} of {tuple(images.shape[1:])}")
    return torch.cat([network(batch / 255) for batch in images.split(BATCH_SIZE)])  # (N, 10)


def save_judge(path: Path, network: JudgeNet, facts: dict[str, Any]) -> None:
    """Writes weights and facts as one safetensors file, atomically."""
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in network.state_dict().items()
    }
    write_atomically(path, serialize(tensors, {METADATA_KEY: json.dumps(facts)}))


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The judge in that file; JudgeError, in one sentence, for whatever is wrong with it."""
    network = JudgeNet()
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA_KEY])
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        float(facts["test_accuracy"])
    except OSError as error:
        raise JudgeError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise JudgeError(f"{path} does not hold a judge: train one with python -m scripts.judge train") from error
    return Judge(network.eval().requires_grad_(False), facts, sha256)
