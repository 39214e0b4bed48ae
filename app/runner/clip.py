"""The CLIP model of the service. It compares images with text, and guides the denoising steps.

Scoring runs in its own thread on the same CPU as the steps. A thread of normal priority would take CPU time from them:
the compute threads of a step wait for each other, so that a step takes as long as its slowest thread. On Linux the
scoring thread therefore has the scheduling policy SCHED_IDLE and uses only the CPU time that all others leave. This was
measured on two cores with steps of 16 rows in compiled bfloat16. A step took 14.5 ms without scoring, 14.75 ms with
SCHED_IDLE, 15.8 ms with the nice value 19 (at most 174 ms) and 54.7 ms with normal priority. The price: while steps use
all cores, 2 to 4 images per second are scored. Otherwise it is 430 per second.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from app.engine.interface import ClipInfo, Embeddings, RunnerError
from app.engine.job import Pixels
from model import clip
from model.clip import Clip, ClipError
from model.pixels import from_pixels


class ClipModel:
    """A CLIP model on the device of the runner. Any number of threads may call it at the same time."""

    def __init__(self, model: Clip) -> None:
        self.clip = model
        self.info = ClipInfo(_name_for_clients(model.name), model.sha256)

    @classmethod
    def load(cls, setting: str, device: torch.device) -> "ClipModel | None":
        """Returns the model that UNFOG_CLIP names, or None. Raises RunnerError if it cannot be loaded.

        The weights must not be inference tensors, because guidance needs the gradient with respect to the image.
        """
        if setting == "off" or (setting == "auto" and not clip.is_installed()):
            return None
        try:
            return cls(Clip(clip.EMBEDDED_NAME if setting == "auto" else setting, device))
        except ClipError as error:
            raise RunnerError(f"UNFOG_CLIP: {error}") from error

    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Returns the embeddings (P, E) of the prompts."""
        return _to_numpy(self.clip.embed_prompts(prompts))

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Pixels]) -> Embeddings:
        """Returns the embeddings (N, E) of grey images (H, W) or colour images (H, W, C) of one size."""
        layout = "n h w -> n 1 h w" if images[0].ndim == 2 else "n h w c -> n c h w"
        pixels = rearrange(torch.from_numpy(np.stack(images)), layout).to(self.clip.device)  # (N, C, H, W)
        return _to_numpy(self.clip.embed_images(from_pixels(pixels)))

    def prepare_thread(self) -> None:
        """Gives the calling thread the scheduling policy SCHED_IDLE if there is one, and one compute thread."""
        with suppress(AttributeError, OSError):  # Only Linux has the policy, and a container may forbid the call.
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        torch.set_num_threads(1)


def _to_numpy(embeddings: Tensor) -> Embeddings:
    array: Embeddings = embeddings.cpu().numpy()
    return array


def _name_for_clients(name: str) -> str:
    """Returns the name of a model without the folders of a path on the server."""
    architecture, separator, weights = name.partition(":")
    return f"{architecture}:{Path(weights).name}" if separator else Path(name).name
