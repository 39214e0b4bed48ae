"""Builds and runs the Docker image and the compose project. Needs --containers and a Docker engine."""

import errno
import json
import os
import re
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.containers.panels import expressions
from tests.containers.stack import BUILD_PATIENCE, PATIENCE, ROOT, Stack, docker, eventually

MAX_IMAGE_BYTES = 1_200_000_000  # limit for the CPU image
SERVICES = ("unfog", "prometheus", "grafana")
NO_CAPABILITIES = "0" * 16

pytestmark = pytest.mark.timeout(BUILD_PATIENCE + 10 * PATIENCE)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Builds the images and removes them at the end. Prints the service logs if a test failed."""
    if not request.config.getoption("--containers"):
        pytest.skip("builds and runs images: needs --containers and a Docker engine")
    stack = Stack(tmp_path_factory.mktemp("containers"), request.config.getoption("--wheels"))
    failed_before = request.session.testsfailed
    try:
        stack.build()
        yield stack
        if request.session.testsfailed > failed_before:
            print(stack.compose("logs", "--no-color", "--tail", "200"))
    finally:
        stack.remove()


@pytest.fixture
def stack(built: Stack) -> Stack:
    """Starts all services that a previous test has stopped and waits until they are healthy."""
    built.up()
    return built


def generate(stack: Stack, **body: Any) -> httpx.Response:
    return httpx.post(stack.url("unfog", "/generate"), json=body, headers={"accept": "image/png"}, timeout=PATIENCE)


def image_of(stack: Stack) -> Any:
    return json.loads(docker("image", "inspect", stack.image))[0]


def test_image_is_smaller_than_the_limit(built: Stack) -> None:
    assert 0 < image_of(built)["Size"] <= MAX_IMAGE_BYTES


def test_image_has_labels_user_entrypoint_and_health_check(built: Stack) -> None:
    config = image_of(built)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["python", "-m", "app"]  # a shell as process 1 would not forward SIGTERM
    assert config["Healthcheck"]["Test"][0] == "CMD"
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert (labels["title"], labels["version"], labels["licenses"]) == ("unfog", version[1], "MIT")
    assert labels["description"]
    assert labels["revision"]


def test_image_has_no_build_tools(built: Stack) -> None:
    found = docker(
        "run", "--rm", "--entrypoint", "sh", built.image, "-c", "command -v python gcc g++ cc c++ ld make git; true"
    )
    assert found.split() == ["/opt/venv/bin/python"]


def test_compose_reserves_a_gpu_except_with_the_cpu_override(built: Stack) -> None:
    def devices(config: Any) -> list[Any]:
        reservations = [config["services"][name]["deploy"]["resources"].get("reservations") for name in gpu_services]
        return [(reservation or {}).get("devices") for reservation in reservations]

    gpu_services = ("unfog", "train")
    options = ("--profile", "train", "config", "--format", "json")
    with_gpu = json.loads(docker("compose", "--env-file", "/dev/null", "--file", "docker-compose.yml", *options))
    for config, device in ((with_gpu, "cuda"), (json.loads(built.compose(*options)), "cpu")):
        assert config["services"]["unfog"]["environment"]["UNFOG_DEVICE"] == device
    assert devices(with_gpu) == [[{"capabilities": ["gpu"], "driver": "nvidia", "count": 1}]] * 2
    assert devices(json.loads(built.compose(*options))) == [None] * 2


def test_same_seed_gives_the_same_png(stack: Stack) -> None:
    one, again, other = (generate(stack, digit=7, seed=seed) for seed in (42, 42, 43))
    assert (one.status_code, one.headers["content-type"]) == (200, "image/png")
    assert one.content.startswith(b"\x89PNG")
    assert one.content == again.content != other.content


def test_image_contains_the_files_of_the_page(stack: Stack) -> None:
    page = stack.get("unfog", "/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert stack.get("unfog", "/static/main.js").status_code == 200


def test_step_was_compiled_during_the_image_build(stack: Stack) -> None:
    health = stack.get("unfog", "/health").json()
    assert (health["status"], health["compiled"], health["device"]) == ("ok", True, "cpu")
    assert "Compiling" not in stack.compose("logs", "unfog")


def test_every_container_runs_without_privileges(stack: Stack) -> None:
    for service in SERVICES:
        status = stack.status_of(service)
        assert [status[name] for name in ("CapEff", "CapPrm", "CapBnd")] == [NO_CAPABILITIES] * 3, service
        assert status["NoNewPrivs"] == "1", service
        assert "0" not in status["Uid"].split(), service
        host = stack.container(service)["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["Memory"] > 0, service
        assert host["PidsLimit"] > 0, service
    assert stack.status_of("unfog")["Uid"].split() == ["10001"] * 4


def test_only_tmp_and_the_kernel_folder_are_writable_and_tmp_is_noexec(stack: Stack) -> None:
    script = """
import errno, os, pathlib, stat
for folder in ("/tmp", "/opt/unfog/gpu", "/home/unfog", "/runs", "/opt/unfog"):
    try:
        (pathlib.Path(folder) / "file").touch()
        mode, mount = stat.S_IMODE(os.stat(folder).st_mode), os.statvfs(folder)
        print(folder, "noexec" if mount.f_flag & os.ST_NOEXEC else f"exec {mode:o}")
    except OSError as error:
        print(folder, errno.errorcode[error.errno])
"""
    read_only = errno.errorcode[errno.EROFS]  # not EACCES, because the user owns the folders
    written = stack.compose("exec", "-T", "unfog", "python", "-c", script).splitlines()
    assert written == [
        "/tmp noexec",
        "/opt/unfog/gpu exec 700",
        *(f"{folder} {read_only}" for folder in ("/home/unfog", "/runs", "/opt/unfog")),
    ]


def test_cuda_device_without_a_gpu_stops_the_start(built: Stack) -> None:
    """PyTorch in the CPU image is built without CUDA."""
    with pytest.raises(AssertionError, match=r"unfog: UNFOG_DEVICE=cuda: PyTorch \S+ is built without CUDA"):
        docker("run", "--rm", "--env", "UNFOG_DEVICE=cuda", built.image)


def test_prometheus_scrapes_the_service_and_counts_its_images(stack: Stack) -> None:
    eventually(lambda: stack.value('up{job="unfog"}'), "the target is up")
    before = stack.value("sum(unfog_images_total)")
    assert generate(stack, digit=3, count=5).status_code == 200
    eventually(lambda: stack.value("sum(unfog_images_total)") >= before + 5, "five more images are counted")


def test_prometheus_loads_and_evaluates_its_rules(stack: Stack) -> None:
    files = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text()).get("rule_files")
    if not files:
        pytest.skip("deploy/prometheus/prometheus.yml names no rule files")

    def rules() -> list[Any]:
        groups = stack.get("prometheus", "/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    assert {rule["type"] for rule in rules()} == {"alerting", "recording"}
    eventually(lambda: {rule["health"] for rule in rules()} == {"ok"}, "every rule was evaluated")


def test_grafana_serves_the_dashboard_and_its_panels_have_data(stack: Stack) -> None:
    if stack.stand_ins:  # a warning, so that the summary of pytest shows it
        with warnings.catch_warnings(action="default"):
            warnings.warn("Grafana image not available: tested with a substitute", stacklevel=1)
    response = stack.get("grafana", "/api/dashboards/uid/unfog")
    assert response.status_code == 200, response.text
    targets = expressions(response.json()["dashboard"])
    assert targets

    def series(expression: str) -> list[Any]:
        path = "/api/datasources/proxy/uid/prometheus/api/v1/query"
        response = stack.get("grafana", path, params={"query": expression})
        assert response.status_code == 200, f"{expression}: {response.text}"
        return list(response.json()["data"]["result"])

    def with_data() -> list[str]:
        generate(stack, digit=1)  # a rate needs an increase between two scrapes
        return [expression for expression in targets if series(expression)]

    eventually(lambda: len(with_data()) > 0.8 * len(targets), "panels have data")
    assert any("unfog_images" in expression for expression in with_data())


def test_grafana_has_no_default_admin_login(stack: Stack) -> None:
    for user, password in (("admin", "admin"), ("admin", "")):
        assert stack.get("grafana", "/api/dashboards/uid/unfog", auth=(user, password)).status_code == 401


def test_killed_service_restarts_and_prometheus_scrapes_it_again(stack: Stack) -> None:
    started = 'process_start_time_seconds{job="unfog"}'
    before = eventually(lambda: stack.value(started), "Prometheus has scraped the start time")
    container = stack.container("unfog")
    pid = container["State"]["Pid"]
    command = Path(f"/proc/{pid}/cmdline")
    if os.geteuid() or not command.exists() or command.read_bytes() != b"python\0-m\0app\0":
        pytest.skip("kills the process on the host: needs root and a Docker engine on this machine")
    os.kill(pid, signal.SIGKILL)  # after `docker kill` the restart policy does not apply
    eventually(lambda: stack.container("unfog")["RestartCount"] == 1, "the container was restarted")
    eventually(
        lambda: stack.container("unfog")["State"]["Health"]["Status"] == "healthy", "the container is healthy again"
    )
    assert generate(stack, digit=7).status_code == 200
    eventually(lambda: stack.value(started) > before, "Prometheus has scraped the new process")


def test_compose_stop_completes_admitted_requests(stack: Stack) -> None:
    def running() -> bool:
        families = text_string_to_metric_families(stack.get("unfog", "/metrics").text)
        return any(family.name == "unfog_running_images" and family.samples[0].value for family in families)

    with ThreadPoolExecutor() as pool:
        response = pool.submit(generate, stack, digit=4, count=32, seed=1)
        eventually(lambda: response.done() or running(), "the request is running")
        assert not response.done()
        stack.compose("stop", "unfog")
        assert response.result(PATIENCE).status_code == 200
    state = stack.container("unfog")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)  # it would be 137 if Docker had killed the container
    assert "Draining" in stack.compose("logs", "unfog")


@pytest.mark.slow
def test_checkpoint_of_the_train_profile_can_be_served(stack: Stack, mnist_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text('base = "baseline"\nbatch_size = 256\n[unet]\nwidths = [8, 16]\n')
    mounts = ("--volume", f"{mnist_dir}:/data:ro", "--volume", f"{tmp_path / 'tiny.toml'}:/tiny.toml:ro")
    train = ("--profile", "train", "run", "-T", "--rm", *mounts, "train")
    stack.compose("--profile", "train", "build", "train", patience=BUILD_PATIENCE)
    log = stack.compose(
        *train, "--preset", "/tiny.toml", "--epochs", "1", "--out", "/runs/tiny", patience=BUILD_PATIENCE
    )
    assert "compiling the training step" in log
    shipped = stack.get("unfog", "/health").json()["model"]["sha256"]
    stack.environment["UNFOG_CHECKPOINT"] = "/runs/tiny/model.safetensors"
    try:
        stack.up()
        trained = stack.get("unfog", "/health").json()["model"]["sha256"]
        digest = stack.compose("exec", "-T", "unfog", "sha256sum", stack.environment["UNFOG_CHECKPOINT"])
        assert digest.split()[0] == trained != shipped
        assert generate(stack, digit=7).status_code == 200
    finally:
        del stack.environment["UNFOG_CHECKPOINT"]


def test_compose_down_removes_containers_network_and_volumes(stack: Stack) -> None:
    before = {kind: len(found) for kind, found in stack.left().items()}
    assert before["container"] == len(SERVICES)
    assert before["network"] == 1
    assert before["volume"] >= 3
    stack.down()
    assert stack.left() == {"container": [], "network": [], "volume": []}
