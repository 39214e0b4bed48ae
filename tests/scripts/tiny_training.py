"""A training run that takes one second: 52 generated images and a tiny network.

`python -m tests.scripts.tiny_training WHERE SIGNAL ARGUMENTS...` trains and sends itself the signal during the run.
"""

import ctypes
import gzip
import hashlib
import os
import signal
import struct
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.spec import DIGITS
from scripts import train
from scripts.common import mnist
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.training import run, trainer
from scripts.training.recipe import Recipe
from scripts.training.trainer import Trainer

NUM_IMAGES, NUM_VALIDATION, NUM_STEPS = 52, 20, 12

COSINE = f"""
epochs = 3
batch_size = 8
precision = "bfloat16"
label_drop = 0.2
grad_clip = 1.0
ema_max_decay = 0.999
[optimizer]
name = "adamw"
lr = 1e-2
betas = [0.9, 0.99]
weight_decay = 1e-4
[lr_schedule]
name = "cosine"
warmup_steps = 3
[guidance]
scale = 1.3
[schedule]
kind = "cosine"
num_steps = {NUM_STEPS}
[unet]
num_steps = {NUM_STEPS}
widths = [8, 16]
num_pairs = 1
attention_heads = 2
time_dim = 8
embed_dim = 8
"""

PLATEAU = f"""
epochs = 3
batch_size = 8
precision = "float32"
label_drop = 0.0
grad_clip = 0.0
ema_max_decay = 0.0
[optimizer]
name = "adam"
lr = 0.1
betas = [0.9, 0.999]
weight_decay = 0.0
[lr_schedule]
name = "plateau"
patience = 0
factor = 0.5
[guidance]
scale = 1.0
[schedule]
kind = "linear"
num_steps = {NUM_STEPS}
[unet]
num_steps = {NUM_STEPS}
stem_patch = 4
widths = [8]
num_pairs = 1
residual = false
conditioning = "bottom"
attention_heads = 0
time_dim = 8
embed_dim = 8
"""

RECIPES = {"cosine": COSINE, "plateau": PLATEAU}


def recipe_of(name: str, **fields: Any) -> Recipe:
    """Returns the recipe `cosine` or `plateau` with the given fields replaced."""
    return Recipe.model_validate(tomllib.loads(RECIPES[name]) | fields)


def noise_data(num_validation: int = NUM_VALIDATION) -> DataSet:
    """Returns NUM_IMAGES grey images of noise, of the ten digits in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(NUM_IMAGES) % 10
    learn = ImageSet(images[:-num_validation], labels[:-num_validation])
    validate = ImageSet(images[-num_validation:], labels[-num_validation:])
    return DataSet("noise", DIGITS, learn, validate, validate)


def idx_files(num_images: int = NUM_IMAGES) -> dict[str, bytes]:
    """Returns both splits as IDX files: magic number, sizes, bytes. Each digit is a bar at a different height."""
    files = {}
    for prefix in ("train", "t10k"):
        random = np.random.default_rng(len(prefix))
        labels = random.permutation(np.arange(num_images, dtype=np.uint8) % 10)
        images = random.integers(0, 40, (num_images, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4 : 2 * label + 7, 4:24] = 255
        files[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4i", 2051, num_images, 28, 28) + images.tobytes()
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, num_images) + labels.tobytes()
    return files


def write_idx_files(folder: Path, *, packed: bool = False, num_images: int = NUM_IMAGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in idx_files(num_images).items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)


def trust_idx_files(patch: pytest.MonkeyPatch, num_images: int = NUM_IMAGES) -> None:
    """Makes `load_mnist` accept the generated images as MNIST."""
    sums = {name: hashlib.md5(content).hexdigest() for name, content in idx_files(num_images).items()}
    patch.setattr(mnist, "CHECKSUMS", sums)
    patch.setattr(mnist, "NUM_VALIDATION", NUM_VALIDATION)
    patch.setattr(mnist, "UNLEARNED_OF_EACH", num_images // 14)


def end_at(where: str, number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Sends this process a signal in the middle of the second epoch, or while that epoch's state is written.

    With "compile", sends it while the step is compiled, by native code that does not end.
    """

    def kill(*args: Any) -> None:
        os.kill(os.getpid(), number)

    calls = iter(range(1000))
    if where == "epoch":
        learn = Trainer._learn_from
        steps = (NUM_IMAGES - NUM_VALIDATION) // 8
        patch.setattr(
            Trainer, "_learn_from", lambda *args: kill() if next(calls) == steps + steps // 2 else learn(*args)
        )
    elif where == "write":
        write = run.write_atomically

        def write_or_die(path: Path, data: bytes) -> None:
            if path.name == "state.pt" and next(calls) == 1:
                patch.setattr(os, "fsync", kill)
            write(path, data)

        patch.setattr(run, "write_atomically", write_or_die)
    elif where == "compile":
        lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)

        def compile_forever(*args: Any) -> None:
            threading.Timer(0.1, kill).start()
            lock(mutex)
            lock(mutex)

        patch.setattr(torch, "compile", lambda function, **options: compile_forever)
        patch.setattr(trainer, "use_private_compile_cache", lambda cache: None)
    else:
        raise ValueError(where)


if __name__ == "__main__":
    where, number, *arguments = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch)
        end_at(where, signal.Signals[number], patch)
        train.main(arguments)
