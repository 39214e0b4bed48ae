"""The unit of systemd agrees with the settings and the exit statuses of the service."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from app.settings import Settings, variable_of
from tests.docs.markdown import blocks

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/unfog.service"
TEXT = UNIT.read_text()
VALUES = dict(re.findall(r"^(\w+)=(.*)$", TEXT, re.MULTILINE))


def test_stop_waits_longer_than_the_drain() -> None:
    assert int(VALUES["TimeoutStopSec"]) >= Settings().drain_timeout + 15


def test_start_that_fails_because_of_a_setting_is_not_repeated() -> None:
    assert (VALUES["Restart"], VALUES["RestartPreventExitStatus"]) == ("on-failure", "2")


def test_variables_are_settings_of_the_folders_that_systemd_creates() -> None:
    folders = dict(assignment.split("=") for assignment in VALUES["Environment"].split())
    assert set(folders) <= {variable_of(field) for field in Settings.model_fields}
    created = {f"/var/cache/{VALUES['CacheDirectory']}", f"/var/lib/{VALUES['StateDirectory']}"}
    assert set(folders.values()) == created


def test_memory_limit_is_that_of_the_compose_file() -> None:
    (compose,) = re.findall(r"UNFOG_MEMORY:-(\d+)g", (ROOT / "docker-compose.cpu.yml").read_text())
    assert VALUES["MemoryMax"] == f"{compose}G"


def test_documented_commands_name_the_paths_of_the_unit() -> None:
    text = "\n".join(block.text for block in blocks(ROOT / "docs/run-it.md", "bash"))
    paths = [VALUES["WorkingDirectory"], VALUES["EnvironmentFile"].lstrip("-"), "deploy/systemd/unfog.service"]
    assert [path for path in paths if path not in text] == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = shutil.which("true")
    assert program
    unit = tmp_path / "unfog.service"
    unit.write_text(TEXT.replace("/opt/unfog/.venv/bin/python", program))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "unfog.service" in line]
    assert (done.returncode, complaints) == (0, [])
