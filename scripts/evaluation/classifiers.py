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
from torch.nn import functional as F

from model.files import write_atomically
from model.spec import DIGITS
from scripts.common.data.source import MAX_CLASSES
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES

WEIGHTS = Path(__file__).parent / "weights"
CLIP_FOR_FEATURES = WEIGHTS / "clip"  # in open_clip's format; of scripts.train_clip --for-features
METADATA_KEY = "unfog_classifier"
BATCH_SIZE = 500
PATCH = 2  # pixels of a side of the patches that the judge for colour images whitens
NUM_WHITENED = 5000  # at most this number of images gives their covariance
WHITENING_EPS = 3e-5  # added to each variance, so that components without information are not amplified
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
    weight_decay, label_smoothing = 0.02, 0.05  # of the training
    flip = False  # the training mirrored each image with probability 0.5

    def __init__(self, body: nn.Sequential, dropout: float, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.num_features, shape.num_classes)

    def prepare(self, images: Tensor) -> None:
        """Sets weights that follow from the training images, uint8 (N, C, H, W), before the training. Here, none do."""

    def features(self, x: Tensor) -> Tensor:
        """Returns the inputs of the head, (B, F)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, (B, K)."""
        return self.head(self.dropout(self.features(x)))


class Judge(Classifier):
    """Five convolutions with batch norm, followed by global average pooling. For grey images."""

    def __init__(self, shape: Shape = DIGITS_SHAPE) -> None:
        channels, width = shape.image[0], shape.width
        self.num_features = 4 * width
        body = nn.Sequential(
            *_conv(channels, width, 5),
            nn.MaxPool2d(2),
            *_conv(width, 2 * width, 3),
            *_conv(2 * width, 2 * width, 3),
            nn.MaxPool2d(2),
            *_conv(2 * width, 4 * width, 3),
            *_conv(4 * width, 4 * width, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        super().__init__(body, 0.2, shape)


class ColourJudge(Classifier):
    """Three pairs of convolutions behind a layer that whitens patches of pixels, after Jordan (2024).

    Small photographs are harder to recognise than digits. "94% on CIFAR-10 in 3.29 seconds on a single GPU" gives the
    reasons for the order of the layers, and for the weight decay and the label smoothing: with less of both, the
    network learns the training images by heart.
    """

    weight_decay, label_smoothing = 0.5, 0.2

    def __init__(self, shape: Shape) -> None:
        (channels, side, _), width = shape.image, shape.width
        self.num_features = 8 * width
        layers: list[nn.Module] = []
        before, side = 2 * channels * PATCH**2, side - PATCH + 1  # the channels and the size after the whitening
        for after in (2 * width, 4 * width, 8 * width):
            halved = min(2, side)  # 1 if nothing is left to halve
            layers += [*_pooled(before, after, halved), *_pooled(after, after, 1)]
            before, side = after, side // halved
        body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        super().__init__(body, 0.0, shape)
        self.whitening = nn.Conv2d(channels, 2 * channels * PATCH**2, PATCH)

    def features(self, x: Tensor) -> Tensor:
        """Returns the inputs of the head, (B, F). After the training, they are the mean for several views of x.

        The views are x and x shifted by a pixel in both diagonal directions, and after a training with `flip` also
        their mirror images.
        """
        if self.training:
            return self._features_of_view(x)
        moved = F.pad(x, (1,) * 4, mode="replicate")  # (B, C, H + 2, W + 2)
        views = [x, moved[..., :-2, :-2], moved[..., 2:, 2:]]
        views += [view.flip(-1) for view in views] if self.flip else []
        return torch.stack([self._features_of_view(view) for view in views]).mean(dim=0)

    def _features_of_view(self, x: Tensor) -> Tensor:
        return self.body(F.gelu(self.whitening(x)))

    def prepare(self, images: Tensor) -> None:
        """Lets the first layer whiten the patches of these images, and excludes its weights from the training.

        The first half of its outputs are the principal components of a patch, with mean 0 and variance 1. The second
        half are their negatives.
        """
        # The images of a folder are in the order of their classes, so those at regular distances are taken.
        x = images[:: -(-len(images) // NUM_WHITENED)] / 255
        patches = F.unfold(x, PATCH).transpose(1, 2).flatten(0, 1)  # (N * positions, P)
        mean = patches.mean(dim=0)  # (P,)
        variances, components = torch.linalg.eigh(torch.cov(patches.T, correction=0))  # (P,), (P, P)
        filters = components.T / (variances + WHITENING_EPS).sqrt()[:, None]  # (P, P)
        weight, bias = torch.cat([filters, -filters]), torch.cat([-filters @ mean, filters @ mean])
        self.whitening.weight = nn.Parameter(weight.reshape(self.whitening.weight.shape), requires_grad=False)
        self.whitening.bias = nn.Parameter(bias)


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


def judge_for(shape: Shape = DIGITS_SHAPE) -> Classifier:
    """Returns a new judge for images of this shape."""
    return Judge(shape) if shape.image[0] == 1 else ColourJudge(shape)


KINDS: dict[str, Callable[[Shape], Classifier]] = {"judge": judge_for, "extractor": Extractor, "fog_judge": Judge}


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


def _pooled(in_channels: int, out_channels: int, size: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])  # at first, the input is passed on, and the other channels are new
    pool = [nn.MaxPool2d(size)] if size > 1 else []
    return conv, *pool, nn.BatchNorm2d(out_channels), nn.GELU()


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
            network.flip = bool(facts.get("flip"))
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
