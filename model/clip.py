"""CLIP (Radford 2021): embeds images and prompts in one space, where a prompt is close to the images that it describes.

The models are loaded by open_clip, which the extra `clip` installs. A small model for digits ships with this package.
"""

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import tensors_sha256
from model.spec import EMBEDDED

EMBEDDED_NAME = "embedded"
INSTALL = "pip install -e '.[clip]'"
MAX_WORD_LENGTH = 30  # longer words count as unknown, because the time of the tokenizer is quadratic in the length


class ClipError(Exception):
    """A CLIP model cannot be loaded. The message is one line."""


class ClipNotInstalledError(ClipError):
    """The extra `clip` is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "CLIP needs open_clip, which is not installed. If PyTorch is the CPU build, read docs/configuration.md "
            f"first. Install it with: {INSTALL}"
        )


def is_installed() -> bool:
    """Returns True if open_clip is installed. Does not import it, because the import takes seconds."""
    return importlib.util.find_spec("open_clip") is not None


def import_open_clip() -> ModuleType:
    """Imports open_clip, which takes seconds. Raises ClipNotInstalledError."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import open_clip  # type: ignore[import-untyped]

            return open_clip
    except ImportError as error:
        raise ClipNotInstalledError from error


def name_without_folders(name: str) -> str:
    """Returns the name of a model, see Clip, without the folders of a path on this machine."""
    architecture, separator, weights = name.partition(":")
    return f"{architecture}:{Path(weights).name}" if separator else Path(name).absolute().name


class Clip:
    """A CLIP model. The weights are float32 and do not change. Any number of threads may call it at the same time."""

    def __init__(self, name: str = EMBEDDED_NAME, device: torch.device | None = None) -> None:
        """Loads a model: `embedded`, a folder in open_clip's format, `ARCHITECTURE:TAG` or `ARCHITECTURE:FILE`.

        open_clip downloads the weights of a tag. For a file with OpenAI's weights, use the architecture with their
        activation: `ViT-B-32-quickgelu:FILE`. Raises ClipError if the model cannot be loaded.
        """
        self.name, self.device = name, device or torch.device("cpu")
        architecture, _, weights = name.partition(":")
        if not weights:
            architecture = f"local-dir:{EMBEDDED if name == EMBEDDED_NAME else name}"
        self.model, self._tokenizer, self._preprocess = _load(architecture, weights or None)
        state = self.model.state_dict()
        self.sha256 = tensors_sha256(state)
        words = [tensor for name, tensor in state.items() if name.endswith("token_embedding.weight")]
        self._is_trained = words[0].any(dim=1) if words else torch.ones(1, dtype=torch.bool)  # (V,) for each token
        # Made once: torch would start threads for a reduction of this size in each thread that asks.
        self._has_trained_all = bool(self._is_trained.all())
        self._is_known = lru_cache(maxsize=4096)(self._has_trained_tokens)
        self.model.to(self.device)
        # Made once: a tensor that is made from a list in each call would make the host wait for a GPU.
        self._mean, self._std = (
            torch.tensor(self._preprocess[name], device=self.device)[None, :, None, None] for name in ("mean", "std")
        )  # (1, 3, 1, 1) each

    @torch.inference_mode()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Returns embeddings (P, E) of length 1. Words after the model's context length are ignored."""
        return F.normalize(self.model.encode_text(self._tokenizer(list(prompts)).to(self.device)), dim=1)

    def unknown_words(self, prompts: Iterable[str]) -> list[str]:
        """Returns the words of the prompts that the model has not learned, without repetitions.

        The embeddings of tokens that did not occur in its training are zero in `embedded` (see scripts.train_clip).
        Published models have learned all tokens.
        """
        if self._has_trained_all:
            return []
        words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+", prompt.lower()))
        return [word for word in words if len(word) > MAX_WORD_LENGTH or not self._is_known(word)]

    def _has_trained_tokens(self, word: str) -> bool:
        return bool(self._is_trained[self._tokenizer([word])[0]].all())

    def embed_images(self, x: Tensor) -> Tensor:
        """Returns embeddings (B, E) of length 1, differentiable with respect to the images (B, C, H, W) in [-1, 1].

        The images are prepared as in open_clip: resized to the size of the model, and normalised. A grey image gets
        three equal channels.
        """
        size = self._preprocess["size"]
        x = ((x + 1) / 2).expand(-1, 3, -1, -1)  # (B, 3, H, W) in [0, 1]
        if x.shape[2:] != size:
            mode = self._preprocess["interpolation"]
            x = F.interpolate(x, size, mode=mode, antialias=True).clamp(0, 1)  # (B, 3, size, size)
        return F.normalize(self.model.encode_image((x - self._mean) / self._std), dim=1)  # (B, E)


def _load(architecture: str, weights: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Returns the model, its tokenizer, and how its images are prepared."""
    open_clip = import_open_clip()
    name = f"{architecture}:{weights}" if weights else architecture.removeprefix("local-dir:")
    if not weights and not Path(name).is_dir():
        raise ClipError(
            f"Cannot load CLIP model {name!r}: no such folder. Use a folder in open_clip's format, ARCHITECTURE:TAG or "
            "ARCHITECTURE:FILE"
        )
    known = open_clip.pretrained.get_pretrained_cfg(architecture, weights) if weights else {}
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.CRITICAL)  # open_clip logs each step and each error to the root logger
    try:
        with warnings.catch_warnings(action="ignore"):
            model, _ = open_clip.create_model_from_pretrained(
                architecture, weights, force_quick_gelu=bool(known.get("quick_gelu"))
            )
            tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # exceptions of many types: missing or damaged file, unknown name, no network
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ClipError(f"Cannot load CLIP model {name!r}: {reason}") from error
    finally:
        root.setLevel(level)
    return model.eval().requires_grad_(False), tokenizer, open_clip.get_model_preprocess_cfg(model)
