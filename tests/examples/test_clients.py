"""The clients in examples/ with the shipped models in a running service that requires an API key."""

import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from model.spec import SHIPPED
from tests.e2e.browser.conftest import arguments, program
from tests.e2e.conftest import start_service
from tests.e2e.service import Service, open_png
from tests.examples.programs import EXAMPLES, KEY, Failing, failing_server, run_program


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with ExitStack() as stack:
        yield start_service(
            stack,
            SHIPPED,
            UNFOG_MAX_BATCH="32",
            UNFOG_REQUEST_TIMEOUT="300",
            UNFOG_API_KEYS=KEY,
            UNFOG_CORS_ORIGINS="*",
        )


def run_in(folder: Path, name: str, url: str) -> list[str]:
    """Runs an example that must succeed and writes into the folder. Returns the lines of its output."""
    folder.mkdir(exist_ok=True)
    done = run_program(EXAMPLES / name, url, str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}
    return done.stdout.splitlines()


def check_image(path: Path, digit: int, *, side: int, steps: int = 10) -> dict[str, str]:
    """Checks the size and the provenance of a PNG file, and returns its text chunks."""
    pixels, text, mode = open_png(path.read_bytes())
    assert (pixels.shape, mode) == ((side, side), "L")
    assert (text["Digit"], text["Steps"]) == (str(digit), str(steps))
    return text


# client.py, client.mjs, curl.sh


@dataclass
class Run:
    """A run of a client that retried its first request."""

    name: str
    folder: Path
    lines: list[str]
    server: Failing

    @property
    def expected(self) -> list[str]:
        """The paths of the requests of a run without failures."""
        archive = ["/generate"] if self.name == "curl.sh" else []
        return ["/generate", *archive, "/generate?previews=5", "/recognize"]


@pytest.fixture(scope="module", params=["client.py", "client.mjs", "curl.sh"])
def ran(request: pytest.FixtureRequest, service: Service, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a client. Its first attempt gets 429. The answer to the second one is lost, but curl does not retry that."""
    failures = [429] if request.param == "curl.sh" else [429, None]
    folder = tmp_path_factory.mktemp("client") / "out"
    with failing_server(Failing(service.url, list(failures), retry_after="1")) as server:
        lines = run_in(folder, request.param, server.url)
    return Run(request.param, folder, lines, server)


def test_client_repeats_exactly_the_failed_attempts_with_the_same_key(ran: Run) -> None:
    failed = len(ran.server.keys) - len(ran.expected)
    assert failed == (1 if ran.name == "curl.sh" else 2)
    assert ran.server.paths == ["/generate"] * failed + ran.expected
    repeated, others = ran.server.keys[: failed + 1], ran.server.keys[failed + 1 :]
    assert len(set(repeated)) == 1
    assert len({*others, *repeated}) == len(others) + 1


def test_attempt_after_a_lost_answer_gets_the_same_bytes(ran: Run) -> None:
    written = (ran.folder / "seven.png").read_bytes()
    expected = [written] if ran.name == "curl.sh" else [written, written]
    assert ran.server.answers[: len(expected)] == expected


def test_client_generates_a_seven_and_recognises_it(ran: Run) -> None:
    text = check_image(ran.folder / "seven.png", 7, side=112)
    assert any(line.startswith("recognised 7") for line in ran.lines)
    if ran.name != "curl.sh":
        assert f"wrote seven.png with seed {text['Seed']}" in ran.lines


def test_client_shows_the_progress_of_a_stream_and_writes_all_images(ran: Run) -> None:
    steps = [int(line.split()[1]) for line in ran.lines if line.startswith("step ")]
    assert steps == [2, 4, 6, 8, 10]
    if ran.name == "curl.sh":
        check_image(ran.folder / "stream.png", 5, side=112)
        with zipfile.ZipFile(ran.folder / "zeros.zip") as archive:
            assert archive.namelist() == [f"digit-0-seed-2-{index}.png" for index in range(3)]
    else:
        texts = [check_image(ran.folder / f"stream-{index}.png", 7, side=112) for index in range(2)]
        assert [text["Index"] for text in texts] == ["0", "1"]


IN_A_PAGE = """async ([url, key]) => {
    const { service, post, events } = await import("/client.mjs");
    Object.assign(service, { url, key });
    const body = { digit: 7, seed: 42, sampler: "dpmpp", num_steps: 10 };
    const names = [];
    for await (const [name] of events(await post("/generate?previews=2", "text/event-stream", body))) names.push(name);
    const response = await post("/generate", "image/png", body);
    const form = new FormData();
    form.set("image", await response.blob());
    const answer = await (await post("/recognize", "application/json", form)).json();
    return { names, seed: response.headers.get("X-Seed"), digit: answer.digit };
}"""


class ExampleFiles(SimpleHTTPRequestHandler):
    """Serves the files in examples/."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(EXAMPLES))

    def log_message(self, *_: object) -> None:
        """Keeps the output of the tests clean."""


def test_javascript_client_works_in_a_web_page_of_another_origin(service: Service) -> None:
    if not program():
        pytest.skip("needs Chromium")
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), ExampleFiles) as server,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=program(), args=arguments()) as browser,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        found = page.evaluate(IN_A_PAGE, [service.url, KEY])
        server.shutdown()
    assert found == {
        "names": ["accepted", "progress", "progress", "image", "done"],
        "seed": "42",
        "digit": 7,
    }


# openai_client.py, openai_client.mjs, triton_client.py


@pytest.fixture(scope="module")
def node_modules(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder node_modules with the npm package openai. Without --node-modules, npm installs the package."""
    given: Path | None = request.config.getoption("--node-modules", None)
    if given:
        return given.resolve()
    if not shutil.which("npm"):
        pytest.skip("needs npm, or --node-modules=FOLDER")
    folder = tmp_path_factory.mktemp("javascript")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", "--ignore-scripts", "openai"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm cannot install the client: {done.stderr[-500:]}")
    return folder / "node_modules"


def check_openai(lines: list[str], folder: Path, *, side: int) -> None:
    names = ["generated-0", "generated-1", "edited", "partial-0", "partial-1", "streamed"]
    assert lines[0] == "models: default, fast"
    assert lines[1:-1] == [f"wrote {name}.png" for name in names]
    assert lines[-1].startswith("error 400 in prompt: ")
    for index in range(2):
        text = check_image(folder / f"generated-{index}.png", 7, side=side)
        assert (text["Seed"], text["Index"]) == ("42", str(index))
    check_image(folder / "streamed.png", 3, side=side)
    for index in range(2):
        pixels, text, _ = open_png((folder / f"partial-{index}.png").read_bytes())
        assert (pixels.shape, text) == ((side, side), {})
    before, after = (open_png((folder / f"{name}.png").read_bytes())[0] for name in ("generated-0", "edited"))
    difference = np.abs(before.astype(int) - after)[: side // 2]  # the mask keeps the upper half
    # The service reduces a larger picture to 28x28 pixels, which changes some grey levels.
    assert difference.max() == 0 if side == 28 else difference.mean() < 10
    assert (before != after).any()


def test_openai_client_generates_edits_streams_and_shows_an_error(service: Service, tmp_path: Path) -> None:
    lines = run_in(tmp_path / "out", "openai_client.py", service.url)
    check_openai(lines, tmp_path / "out", side=280)


def test_openai_client_in_javascript_generates_edits_streams_and_shows_an_error(
    service: Service, node_modules: Path, tmp_path: Path
) -> None:
    program = Path(shutil.copy(EXAMPLES / "openai_client.mjs", tmp_path))
    (tmp_path / "node_modules").symlink_to(node_modules)
    (tmp_path / "out").mkdir()
    done = run_program(program, service.url, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_openai(done.stdout.splitlines(), tmp_path / "out", side=28)


def test_triton_client_generates_an_image_for_each_digit_and_seed(service: Service, tmp_path: Path) -> None:
    lines = run_in(tmp_path / "out", "triton_client.py", service.url)
    assert {"inputs: digit INT64 [-1]", "outputs: image UINT8 [-1, 28, 28, 1]"} <= {*lines}
    for digit, seed in ((7, 2), (7, 3), (3, 4)):
        body = {"digit": digit, "seed": seed, "sampler": "dpmpp", "num_steps": 10}
        generated = service.post(body, "image/png", authorization=f"Bearer {KEY}")
        drawn, _, _ = open_png((tmp_path / "out" / f"digit-{digit}-seed-{seed}.png").read_bytes())
        assert (drawn == open_png(generated.content)[0]).all()


# load.sh


def test_load_test_sends_the_given_number_of_requests(service: Service, tmp_path: Path) -> None:
    if not (shutil.which("oha") or shutil.which("hey")):
        pytest.skip("needs oha or hey")
    before = service.metrics()
    done = run_program(EXAMPLES / "load.sh", service.url, "20", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[200\]\s+20 responses", done.stdout)
    sent = service.metrics().value("requests_total", route="/generate", code="200")
    assert sent - before.value("requests_total", route="/generate", code="200") == 20
