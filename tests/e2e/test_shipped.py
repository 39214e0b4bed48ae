"""Both shipped models in a running service. The judge network classifies their digits."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load
from model.precision import can_compile
from model.spec import SHIPPED, SHIPPED_FAST
from scripts.evaluation.classifiers import accuracy, load_classifier
from tests.e2e.conftest import start_service
from tests.e2e.service import Service, open_png

FEW_STEPS = [{"sampler": "dpmpp", "num_steps": 10}, {"model": "fast"}]
EACH = 16


@pytest.fixture(scope="module")
def shipped() -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED, UNFOG_MAX_BATCH="32", UNFOG_REQUEST_TIMEOUT="300")


def test_default_and_fast_model_are_served_without_settings(shipped: Service) -> None:
    models = {model["name"]: model["sha256"] for model in shipped.client.get("/health").json()["models"]}
    assert models == {"default": load(SHIPPED).sha256, "fast": load(SHIPPED_FAST).sha256}


@pytest.mark.parametrize("options", FEW_STEPS, ids=["default", "fast"])
def test_judge_recognises_the_requested_digits(shipped: Service, options: dict[str, Any]) -> None:
    with ThreadPoolExecutor() as pool:
        pending = [pool.submit(shipped.images, digit=digit, seed=digit, count=EACH, **options) for digit in range(10)]
        pngs = [png for request in pending for png in request.result()]
    images = torch.from_numpy(np.stack([open_png(png)[0] for png in pngs]))[:, None]  # (10 * EACH, 1, 28, 28)
    share = accuracy(load_classifier("judge").network, images, torch.arange(10).repeat_interleave(EACH))
    assert share >= 0.96  # the true accuracy is about 99 %, so this limit is safe with 160 images


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
def test_judge_recognises_digits_of_the_compiled_service(tmp_path: Path) -> None:
    with ExitStack() as stack:
        compiled = start_service(stack, SHIPPED, UNFOG_COMPILE="on", UNFOG_CACHE_DIR=str(tmp_path))
        assert compiled.client.get("/health").json()["compiled"] is True
        pngs = [compiled.images(digit=digit, seed=digit, sampler="dpmpp", num_steps=10)[0] for digit in range(10)]
    images = torch.from_numpy(np.stack([open_png(png)[0] for png in pngs]))[:, None]  # (10, 1, 28, 28)
    assert accuracy(load_classifier("judge").network, images, torch.arange(10)) >= 0.9


def test_both_models_generate_the_same_bytes_while_the_other_runs(shipped: Service) -> None:
    bodies: list[dict[str, Any]] = [
        {"digit": 7, "seed": 7, "count": 2, "num_steps": 12},
        {"digit": 2, "seed": 9, "num_steps": 30},
        {"digit": 5, "seed": 3, "count": 2, "model": "fast"},
    ]
    alone = [shipped.images(**body) for body in bodies]
    before = shipped.metrics()
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(shipped.images, digit=digit, count=16, num_steps=15) for digit in range(4)]
        others += [pool.submit(shipped.images, digit=digit, count=16, model="fast") for digit in range(4)]
        batched = list(pool.map(lambda body: shipped.images(**body), bodies))
        assert all(len(other.result()) == 16 for other in others)
    assert shipped.mean_rows_since(before) >= 16
    assert batched == alone
