"""Tests of POST /score of a running service with the shipped CLIP model."""

import base64
import json
import os
import select
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from model.prompts import digit_prompt
from model.spec import SHIPPED
from scripts.common.mnist import load_mnist
from tests.e2e.conftest import start_service
from tests.e2e.picture_requests import IMAGE, encode
from tests.e2e.process import TIMEOUT, Process
from tests.e2e.service import Service, assert_problem

DIGIT_PROMPTS = [digit_prompt(digit) for digit in range(10)]
BODY: dict[str, Any] = {"images": [base64.b64encode(IMAGE).decode()] * 64, "prompts": DIGIT_PROMPTS}
ROWS = 16  # images in each step of the measurement
WINDOWS, WINDOW_SECONDS = 8, 4.0  # pairs of windows without and with scoring
MAX_RATIO = 1.10


@pytest.fixture(scope="module")
def scoring(checkpoint: Path) -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(stack, checkpoint, UNFOG_CLIP="auto", UNFOG_REQUEST_TIMEOUT="300")


def score(service: Service, body: dict[str, Any] = BODY) -> httpx.Response:
    return service.client.post("/score", json=body)


def policies(pid: int) -> set[int]:
    """Returns the scheduling policies of the threads of a process."""
    return {os.sched_getscheduler(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


def test_answer_has_a_similarity_for_each_picture_and_each_prompt(scoring: Service) -> None:
    response = score(scoring)
    assert response.status_code == 200, response.text
    assert np.array(response.json()["similarities"]).shape == (64, 10)
    scoring.wait_for(1, "requests_in_progress")  # only the scrape itself


def test_only_the_child_process_of_clip_has_the_idle_policy(scoring: Service) -> None:
    assert score(scoring).status_code == 200
    (child,) = psutil.Process(scoring.process.pid).children()
    assert policies(child.pid) == {os.SCHED_IDLE}
    assert os.SCHED_IDLE not in policies(scoring.process.pid)


def test_service_without_clip_has_no_child_process_and_answers_501(service: Service) -> None:
    problem = assert_problem(score(service), 501, "not_available")
    assert "UNFOG_CLIP=off" in problem["detail"]
    assert psutil.Process(service.process.pid).children() == []


def core_seconds(pid: int) -> float:
    """Returns the CPU time that a process has used, with the resolution of the scheduler."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_request_whose_child_process_is_killed_is_answered_by_a_new_one(scoring: Service) -> None:
    expected = score(scoring).json()["similarities"]
    (child,) = psutil.Process(scoring.process.pid).children()
    with ThreadPoolExecutor(1) as pool:
        before = core_seconds(child.pid)
        response = pool.submit(score, scoring)
        while core_seconds(child.pid) == before:
            assert not response.done(), "the child process must use CPU time before the answer"
        child.send_signal(signal.SIGSTOP)  # The child process answers no batch from now on.
        scoring.wait_for(2, "requests_in_progress")  # the request, and the one for the metrics
        child.kill()
        answered = response.result(TIMEOUT)
    assert (answered.status_code, answered.json()["similarities"]) == (200, expected)


def test_child_process_ends_with_the_service(checkpoint: Path) -> None:
    """test_clip_process.py kills the parent instead."""
    with ExitStack() as stack:
        service = start_service(stack, checkpoint, UNFOG_CLIP="auto")
        assert score(service).status_code == 200
        (child,) = psutil.Process(service.process.pid).children()
        ended = os.pidfd_open(child.pid)
        stack.callback(os.close, ended)
        service.process.signal(signal.SIGTERM)
        assert select.select([ended], [], [], TIMEOUT)[0]


def test_client_that_leaves_does_not_block_the_next_request(scoring: Service) -> None:
    content = json.dumps(BODY).encode()
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    for _ in range(20):
        with socket.create_connection(scoring.address) as connection:
            connection.sendall(f"POST /score HTTP/1.1\r\n{head}\r\n".encode() + content)
    assert score(scoring).status_code == 200
    scoring.wait_for(1, "requests_in_progress")  # only the scrape itself


def test_model_that_cannot_be_loaded_stops_the_start_with_one_line(checkpoint: Path, tmp_path: Path) -> None:
    process = Process(UNFOG_CHECKPOINT=str(checkpoint), UNFOG_CLIP=str(tmp_path / "nothing"))
    assert process.wait() == 2
    lines = [line for line in process.lines if not line.startswith("{")]
    assert len(lines) == 1
    assert "UNFOG_CLIP: Cannot load CLIP model" in lines[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_most_similar_prompt_names_the_digit_for_99_percent_of_the_test_digits(
    scoring: Service, mnist_dir: Path
) -> None:
    images, labels = load_mnist("test", mnist_dir)
    found: list[int] = []
    for first in range(0, len(images), 64):
        files = [encode(image[0].numpy()) for image in images[first : first + 64]]
        answer = scoring.client.post(
            "/score",
            files=[("images", ("x.png", file, "image/png")) for file in files],
            data={"prompts": DIGIT_PROMPTS},
        ).json()
        assert answer["images"] == [{"fit": "resize", "inverted": False}] * len(files)
        found += np.array(answer["similarities"]).argmax(axis=1).tolist()
    accuracy = float((np.array(found) == labels.numpy()).mean())
    print(f"accuracy {accuracy:.4f} of {len(found)} test digits")
    assert len(found) == 10_000
    assert accuracy >= 0.99


def mean_step_seconds(service: Service) -> float:
    """Returns the mean time of the steps within the next WINDOW_SECONDS."""
    before = service.metrics()
    time.sleep(WINDOW_SECONDS)
    after = service.metrics()
    name = "denoise_step_duration_seconds"
    seconds, count = (after.value(f"{name}_{part}") - before.value(f"{name}_{part}") for part in ("sum", "count"))
    return seconds / count


@contextmanager
def clients(service: Service, number: int, path: str, body: dict[str, Any]) -> Iterator[list[int]]:
    """Runs clients that send the request in a loop. Yields the statuses of their responses.

    A client that gets 429 waits for as long as the header Retry-After says, at most until the block ends.
    """
    stop, statuses = threading.Event(), list[int]()

    def client() -> None:
        with httpx.Client(base_url=service.url, timeout=TIMEOUT) as http:
            while not stop.is_set():
                response = http.post(path, json=body)
                statuses.append(response.status_code)
                stop.wait(int(response.headers.get("Retry-After", 0)))

    threads = [threading.Thread(target=client) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_constant_load_of_scores_makes_steps_at_most_10_percent_slower() -> None:
    """Compares windows of time with and without scoring, which alternate. Needs an idle machine."""
    with ExitStack() as stack:
        shipped = start_service(
            stack,
            SHIPPED,
            OMP_NUM_THREADS="",
            UNFOG_NUM_THREADS="",
            UNFOG_COMPILE="auto",
            UNFOG_CLIP="auto",
            UNFOG_MAX_BATCH=str(ROWS),
        )
        assert score(shipped).status_code == 200
        # With two clients, every step has ROWS images. Without guidance, all steps have the same work.
        stack.enter_context(clients(shipped, 2, "/generate", {"digit": 3, "count": ROWS, "guidance_scale": 1}))
        shipped.wait_until_running()
        without, scoring = list[float](), list[float]()
        for _ in range(WINDOWS):
            without.append(mean_step_seconds(shipped))
            with clients(shipped, 2, "/score", BODY) as statuses:
                scoring.append(mean_step_seconds(shipped))
            assert set(statuses) <= {200, 429, 504}
    of_means = statistics.mean(scoring) / statistics.mean(without)
    of_medians = statistics.median(scoring) / statistics.median(without)
    print(f"step without {1000 * statistics.median(without):.2f} ms, with {1000 * statistics.median(scoring):.2f} ms")
    print(f"ratio of means {of_means:.3f}, of medians {of_medians:.3f}")
    assert of_means <= MAX_RATIO
    assert of_medians <= MAX_RATIO
