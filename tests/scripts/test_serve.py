"""Tests scripts/serve and scripts/setup.sh in a copy of the project.

Nothing is downloaded. A fake Python on PATH creates real venvs with a fake pip, which logs its arguments.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.fake_python import fake_python

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ["python3", *(f"python3.{minor}" for minor in range(11, 15))]

# Fake pip: logs its arguments and makes the project importable. PIP_ENDING makes it fail or end early. PIP_TORCH is the
# version of PyTorch that it installs. PIP_CONFIGURATION is the output of `pip config list`, by default with an index.
FAKE_PIP = """
import json, os, pathlib, signal, sys, sysconfig, time
site = pathlib.Path(sysconfig.get_path("purelib"))
if sys.argv[1] == "freeze":
    sys.exit(print(os.environ["PIP_FREEZE"]))
if sys.argv[1] == "config":
    sys.exit(print(os.environ.get("PIP_CONFIGURATION", "global.index-url='https://pypi.example/simple'")))
with open(os.environ["PIP_LOG"], "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
print("Collecting thing", flush=True)
ending = os.environ.get("PIP_ENDING")
if ending == "no network":
    sys.exit("no network")
if ending == "interrupted":
    os.killpg(0, signal.SIGINT)
    time.sleep(60)
if ending == "slow":
    time.sleep(0.5)
info = site / "thing-1.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text("Metadata-Version: 2.1\\nName: thing\\nVersion: 1\\n")
if ending == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
(site / "thing.py").write_text("print()")
(info / "RECORD").write_text("thing.py,,7\\n")
(site / "project.pth").write_text(os.getcwd())
if build := os.environ.get("PIP_TORCH"):
    (site / f"torch-{build}.dist-info").mkdir(exist_ok=True)
"""

FAKE_PYTHON = fake_python(FAKE_PIP)

# Fake service: prints its settings, arguments and current folder.
FAKE_APP = """
import json, os, sys
settings = {name: value for name, value in os.environ.items() if name.startswith("UNFOG_")}
print(json.dumps({"settings": settings, "arguments": sys.argv[1:], "folder": os.getcwd()}))
"""


class Project:
    """A copy of the scripts, with a PATH on which `python3` is FAKE_PYTHON."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "pro ject"
        self.bin = folder / "bin"
        self.pip_log = folder / "pip.log"
        self.venv = self.root / ".venv"
        self.pyproject = self.root / "pyproject.toml"
        self.constraints = self.root / "constraints.txt"
        (self.root / "scripts").mkdir(parents=True)
        (self.root / "app").mkdir()
        self.bin.mkdir()
        for name in ("serve", "test", "check", "setup.sh", "environments", "lower_bounds.py"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.pyproject)
        shutil.copy(ROOT / "constraints.txt", self.constraints)
        (self.root / "app" / "__main__.py").write_text(FAKE_APP)
        (folder / "fake.py").write_text(FAKE_PYTHON)
        for name in PYTHONS:
            self.add_command(name, f'exec "{sys.executable}" "{folder / "fake.py"}" "$@"')

    def add_command(self, name: str, script: str) -> None:
        """Adds a command to the front of PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}\n")
        path.chmod(0o755)

    def remove_gpu(self) -> None:
        """Makes the machine look like x86-64 Linux without an NVIDIA GPU."""
        self.add_command("uname", "echo Linux x86_64")
        self.add_command("nvidia-smi", "exit 9")
        script = self.root / "scripts" / "setup.sh"
        text = script.read_text()
        assert "/dev/nvidiactl" in text
        script.write_text(text.replace("/dev/nvidiactl", f"'{self.bin}/nvidiactl'"))

    def start(self, *arguments: str, script: str = "serve", **variables: str) -> "subprocess.Popen[str]":
        """Starts a script. The current folder is not the project folder."""
        # PYTHONPATH, for example, would import the real service instead of the copy.
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("UNFOG_", "PIP_", "PYTHON"))}
        return subprocess.Popen(
            # A background process of a shell ignores SIGINT, and its children inherit this.
            ["env", "--default-signal=INT", str(self.root / "scripts" / script), *arguments],
            env=clean | {"PATH": f"{self.bin}:{clean['PATH']}", "PIP_LOG": str(self.pip_log)} | variables,
            cwd=self.bin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, script: str = "serve", **variables: str) -> tuple[int, str, str]:
        """Runs a script. Returns its exit status, stdout and stderr."""
        process = self.start(*arguments, script=script, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def serve(self, *arguments: str, **variables: str) -> dict[str, object]:
        """Runs scripts/serve. Returns what the fake service printed."""
        status, out, err = self.run(*arguments, **variables)
        assert status == 0, err
        seen: dict[str, object] = json.loads(out)
        return seen

    @property
    def installs(self) -> list[list[str]]:
        """Arguments of every `pip install`."""
        lines = self.pip_log.read_text().splitlines() if self.pip_log.exists() else []
        return [json.loads(line)[1:] for line in lines]

    def constrained(self, target: str) -> list[str]:
        """Returns the pip arguments that install the project with constraints.txt."""
        return ["--constraint", str(self.constraints), "--editable", target]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "::1", "--port=9001", "--checkpoint", "a b.safetensors"],
        ["--port="],
        ["--port"],
        ["--host", ""],
        ["8000", "--colour", "--port", "1", "--help"],
    ],
    ids=" ".join,
)
def test_arguments_are_passed_to_the_service_unchanged(project: Project, arguments: list[str]) -> None:
    seen = project.serve(*arguments, UNFOG_MAX_BATCH="8")
    assert seen["arguments"] == arguments
    assert seen["settings"] == {"UNFOG_MAX_BATCH": "8"}


def test_exit_status_and_stderr_come_from_the_service(project: Project) -> None:
    (project.root / "app" / "__main__.py").write_text("import sys\nprint('wrong', file=sys.stderr)\nsys.exit(2)\n")
    project.run()
    assert project.run("--colour") == (2, "", "wrong\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_the_usage_and_installs_nothing(project: Project, flag: str) -> None:
    status, out, err = project.run(flag)
    assert (status, err) == (0, "")
    assert out.startswith("usage: scripts/serve")
    assert not project.venv.exists()


def test_install_installs_the_extras_and_does_not_start_the_service(project: Project) -> None:
    assert project.run("--install", "train,evaluate")[:2] == (0, "")
    assert any(".[train,evaluate]" in install[-1] for install in project.installs)
    count = len(project.installs)
    project.serve()
    assert len(project.installs) == count  # the service needs no more


@pytest.mark.parametrize("arguments", [["--install", "train; ls"], ["--install", "train", "evaluate"]])
def test_wrong_extras_are_refused_before_the_installation(project: Project, arguments: list[str]) -> None:
    status, _, error = project.run(*arguments)
    assert (status, project.installs) == (2, [])
    assert "--install takes the names of extras, separated by commas, such as train,evaluate" in error


def test_service_runs_in_the_current_folder_of_the_caller(project: Project) -> None:
    (project.bin / "app").mkdir()
    (project.bin / "app" / "__main__.py").write_text("raise SystemExit('the wrong app')")
    assert project.serve()["folder"] == str(project.bin)


def test_second_start_installs_nothing(project: Project) -> None:
    project.serve()
    assert project.installs == [project.constrained(".")]
    project.serve()
    assert len(project.installs) == 1


def test_start_after_check_installs_nothing(project: Project) -> None:
    project.run(script="check")  # fails at ruff, which the fake pip does not install
    assert project.installs == [project.constrained(".[dev]")]
    project.serve()
    assert len(project.installs) == 1


def test_check_after_a_start_installs_the_dev_extra(project: Project) -> None:
    project.serve()
    project.run(script="check")
    assert project.installs == [project.constrained("."), project.constrained(".[dev]")]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_venv(project: Project, name: str) -> None:
    project.serve()
    (project.venv / "kept").touch()
    with (project.root / name).open("a") as file:
        file.write("\n# changed\n")
    project.serve()
    assert len(project.installs) == 2
    assert (project.venv / "kept").exists()


def test_another_python_version_installs_again(project: Project) -> None:
    project.serve()
    stamp = project.venv / "stamp-"
    stamp.write_text(f"3 10\n{stamp.read_text().partition(chr(10))[2]}")
    project.serve()
    assert len(project.installs) == 2
    project.serve()
    assert len(project.installs) == 2


def test_another_extra_includes_the_base_installation(project: Project) -> None:
    script = project.root / "scripts" / "own"
    script.write_text(f"#!/usr/bin/env bash\nset -e\n. '{project.root}/scripts/setup.sh'\nset_up traces\n")
    script.chmod(0o755)
    for _ in range(2):
        assert project.run(script="own")[0] == 0
    project.serve()
    assert project.installs == [project.constrained(".[traces]")]


def test_moved_project_installs_again(project: Project) -> None:
    project.serve()
    project.root = project.root.rename(project.root.with_name("elsewhere"))
    project.serve()
    assert len(project.installs) == 2


def test_venv_without_python_is_created_again(project: Project) -> None:
    project.serve()
    (project.venv / "bin" / "python").unlink()
    project.serve()
    assert len(project.installs) == 2


def test_venv_of_a_killed_install_is_created_again(project: Project) -> None:
    status, out, _ = project.run(PIP_ENDING="killed")
    assert (status, out) == (1, "")
    (project.venv / "gone").touch()
    project.serve()
    assert not (project.venv / "gone").exists()


def test_venv_with_an_incomplete_package_is_created_again(project: Project) -> None:
    project.serve()
    (project.venv / "unfinished").touch()
    next(project.venv.glob("lib/*/site-packages/thing.py")).write_text("pri")
    (project.venv / "gone").touch()
    project.serve()
    assert not (project.venv / "gone").exists()


def test_failed_install_of_an_extra_keeps_the_service_usable(project: Project) -> None:
    project.serve()
    status, _, err = project.run(script="check", PIP_ENDING="no network")
    assert status == 1
    assert "installation failed" in err
    project.serve(PIP_ENDING="no network")
    assert len(project.installs) == 2


def test_installation_is_announced_and_shows_no_output_of_pip(project: Project) -> None:
    status, _, err = project.run()
    assert status == 0
    announced, *_ = err.splitlines()[1:]  # after the creation of the venv
    assert announced.startswith(f"unfog: installing into {project.venv}. This takes minutes")
    assert "Collecting" not in err
    assert (project.venv / "pip.log").read_text() == "Collecting thing\n"


def test_failed_installation_shows_the_whole_output_of_pip(project: Project) -> None:
    status, _, err = project.run(PIP_ENDING="no network")
    assert status == 1
    *_, collecting, reason, advice = err.splitlines()
    assert (collecting, reason) == ("Collecting thing", "no network")
    assert advice.startswith("unfog: installation failed. See the output of pip above")


def test_two_simultaneous_first_starts_install_once(project: Project) -> None:
    starts = [project.start(PIP_ENDING="slow") for _ in range(2)]
    errors = [start.communicate(timeout=60)[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0], errors
    assert len(project.installs) == 1


def test_pytorch_is_installed_from_unfog_torch_index(project: Project) -> None:
    project.serve(UNFOG_TORCH_INDEX="https://index.example/cpu")
    first, second = project.installs
    assert first[:2] == ["--index-url", "https://index.example/cpu"]
    assert [requirement.split(">")[0] for requirement in first[2:]] == ["torch"]
    assert second == project.constrained(".")


def test_torchvision_is_installed_from_unfog_torch_index(project: Project) -> None:
    project.run(script="check", UNFOG_TORCH_INDEX="https://index.example/cpu")
    assert [requirement.split(">")[0] for requirement in project.installs[0][2:]] == ["torch", "torchvision"]


def test_extra_gets_its_torchvision_from_the_index_of_pytorch(project: Project) -> None:
    project.run("--install", "train", UNFOG_TORCH_INDEX="https://index.example/cpu")
    assert [requirement.split(">")[0] for requirement in project.installs[0][2:]] == ["torch", "torchvision"]


@pytest.fixture
def without_gpu(project: Project) -> Project:
    project.remove_gpu()
    return project


def test_without_a_gpu_the_cpu_build_is_installed_and_explained(without_gpu: Project) -> None:
    status, _, err = without_gpu.run(PIP_CONFIGURATION="")
    assert status == 0, err
    first, second = without_gpu.installs
    assert first[:2] == ["--index-url", CPU_INDEX]
    assert [requirement.split(">")[0] for requirement in first[2:]] == ["torch"]
    assert second == without_gpu.constrained(".")
    (line,) = [line for line in err.splitlines() if "NVIDIA" in line]
    assert line.startswith(f"unfog: no NVIDIA GPU found. Installing PyTorch's CPU build ({CPU_INDEX})")
    assert "UNFOG_TORCH_INDEX set to an index of pytorch.org/get-started" in line
    assert str(without_gpu.venv) in line


def test_a_named_torch_index_overrides_the_automatic_choice(without_gpu: Project) -> None:
    _, _, err = without_gpu.run(PIP_CONFIGURATION="", UNFOG_TORCH_INDEX="https://index.example/cuda")
    assert without_gpu.installs[0][:2] == ["--index-url", "https://index.example/cuda"]
    assert "NVIDIA" not in err


@pytest.mark.parametrize(
    "configuration",
    [
        "global.index-url='https://mirror.example/simple'",
        "install.extra-index-url='https://mirror.example/simple'",
        ":env:.find-links='/opt/wheels'\nglobal.cert='/etc/ssl/ca.crt'",
        "global.cert='/etc/ssl/ca.crt'\nglobal.no-index='true'",
        ":env:.pypi-url='https://mirror.example/simple'",
        ":env:.no-index='1'",
    ],
)
def test_a_package_source_in_pips_configuration_is_respected(without_gpu: Project, configuration: str) -> None:
    status, _, err = without_gpu.run(PIP_CONFIGURATION=configuration)
    assert status == 0, err
    assert without_gpu.installs == [without_gpu.constrained(".")]
    assert "installing PyTorch from the package sources in pip's configuration" in err


@pytest.mark.parametrize(
    "configuration",
    [
        "global.cert='/index-url=/ca.crt'",
        ":env:.default-timeout='180'",
        "global.constraint='/c.txt'",
        ":env:.index-url=''",
        "global.no-index='false'",
        "download.index-url='https://mirror.example/simple'",
    ],
)
def test_other_pip_configuration_does_not_prevent_the_cpu_build(without_gpu: Project, configuration: str) -> None:
    without_gpu.serve(PIP_CONFIGURATION=configuration)
    assert [install[:2] for install in without_gpu.installs[:-1]] == [["--index-url", CPU_INDEX]]


@pytest.mark.parametrize("sign", ["nvidia-smi", "nvidiactl"])
def test_with_a_gpu_the_download_of_the_cuda_build_is_announced(without_gpu: Project, sign: str) -> None:
    without_gpu.add_command(sign, "exit 0")
    status, _, err = without_gpu.run(PIP_CONFIGURATION="")
    assert status == 0, err
    assert without_gpu.installs == [without_gpu.constrained(".")]
    (line,) = [line for line in err.splitlines() if "NVIDIA" in line]
    assert line.startswith("unfog: NVIDIA GPU found. Downloading PyTorch's CUDA build (several GB)")
    assert f"UNFOG_TORCH_INDEX={CPU_INDEX}" in line


@pytest.mark.parametrize("machine", ["Linux aarch64", "Darwin arm64"])
def test_other_platforms_use_pips_default_index(without_gpu: Project, machine: str) -> None:
    without_gpu.add_command("uname", f"echo {machine}")
    _, _, err = without_gpu.run(PIP_CONFIGURATION="")
    assert without_gpu.installs == [without_gpu.constrained(".")]
    assert "NVIDIA" not in err


def test_an_installed_cpu_build_gets_its_torchvision_from_the_cpu_index(without_gpu: Project) -> None:
    without_gpu.serve(PIP_CONFIGURATION="", PIP_TORCH="2.13.0+cpu")
    without_gpu.add_command("nvidia-smi", "exit 0")
    _, _, err = without_gpu.run(script="check", PIP_CONFIGURATION="")
    assert [install[:2] for install in without_gpu.installs[-2:]] == [
        ["--index-url", CPU_INDEX],
        without_gpu.constrained(".[dev]")[:2],
    ]
    assert [requirement.split(">")[0] for requirement in without_gpu.installs[-2][2:]] == ["torch", "torchvision"]
    assert "NVIDIA" not in err


def test_an_installed_cuda_build_is_kept_without_a_gpu(without_gpu: Project) -> None:
    without_gpu.serve(PIP_TORCH="2.13.0")
    _, _, err = without_gpu.run(script="check", PIP_CONFIGURATION="")
    assert without_gpu.installs == [without_gpu.constrained("."), without_gpu.constrained(".[dev]")]
    assert "NVIDIA" not in err


def test_ctrl_c_before_a_package_changes_keeps_the_venv(project: Project) -> None:
    project.serve()
    declared = project.pyproject.read_text()
    project.pyproject.write_text(f"{declared}# a change\n")
    status, out, _ = project.run(PIP_ENDING="interrupted")
    assert status
    assert out == ""
    project.pyproject.write_text(declared)
    assert project.serve(PIP_ENDING="no network")


def test_too_old_python_gives_a_one_line_error(project: Project) -> None:
    for name in PYTHONS:
        # Fails both checks of find_python, for the version and for the modules.
        project.add_command(name, "exit 1")
    status, out, err = project.run()
    assert (status, out) == (1, "")
    assert err.startswith("unfog: no Python 3.11 or newer found (tried: python3 ")
    assert err.endswith("). Install python3 and python3-venv\n")
    assert len(err.splitlines()) == 1


def test_missing_venv_module_gives_a_one_line_error_with_the_package(project: Project) -> None:
    for name in PYTHONS:
        project.add_command(name, f"""case "$2" in *ensurepip*) exit 1 ;; *) exec "{sys.executable}" "$@" ;; esac""")
    status, out, err = project.run()
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "python3-venv" in err


def test_newer_python_is_found_if_python3_is_too_old(project: Project) -> None:
    project.add_command("python3", "exit 1")
    for name in PYTHONS[2:]:
        project.add_command(name, "exit 127")
    project.serve()
    assert len(project.installs) == 1
