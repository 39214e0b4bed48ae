"""scripts/serve and the set-up that it shares with other scripts, in a copy of the project.

Nothing is installed: the Python that they find makes real venvs whose pip is a few lines that keep a log.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ["python3", *(f"python3.{minor}" for minor in range(11, 15))]

# Stands in for pip: logs its arguments, makes the project importable, and can give up or die half-way.
FAKE_PIP = """
import json, os, pathlib, signal, sys, sysconfig, time
site = pathlib.Path(sysconfig.get_path("purelib"))
if sys.argv[1] == "freeze":
    sys.exit(print(os.environ["PIP_FREEZE"]))
if sys.argv[1] == "config":
    sys.exit(print(os.environ.get("PIP_CONFIGURATION", "global.index-url='https://pypi.example/simple'")))
with open(os.environ["PIP_LOG"], "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
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

# Stands in for a Python that makes venvs.
FAKE_PYTHON = f"""
import pathlib, subprocess, sys
if sys.argv[1:3] != ["-m", "venv"]:
    sys.exit(subprocess.run([{sys.executable!r}, *sys.argv[1:]]).returncode)
subprocess.run([{sys.executable!r}, "-m", "venv", "--without-pip", sys.argv[3]], check=True)
pip = next(pathlib.Path(sys.argv[3]).glob("lib/python*/site-packages")) / "pip"
pip.mkdir()
(pip / "__init__.py").touch()
(pip / "__main__.py").write_text({FAKE_PIP!r})
"""

# Stands in for the service: says what reached it.
FAKE_APP = """
import json, os, sys
settings = {name: value for name, value in os.environ.items() if name.startswith("UNFOG_")}
print(json.dumps({"settings": settings, "arguments": sys.argv[1:], "folder": os.getcwd()}))
"""


class Project:
    """A copy of the project's scripts, and a search path on which `python3` is FAKE_PYTHON."""

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
            self.give(name, f'exec "{sys.executable}" "{folder / "fake.py"}" "$@"')

    def give(self, name: str, script: str) -> None:
        """Puts a command on the search path, before the machine's own."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}\n")
        path.chmod(0o755)

    def start(self, *arguments: str, script: str = "serve", **variables: str) -> "subprocess.Popen[str]":
        """Starts a script in a folder that is not the project's."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("UNFOG_", "PIP_"))}
        return subprocess.Popen(
            [str(self.root / "scripts" / script), *arguments],
            env=clean | {"PATH": f"{self.bin}:{clean['PATH']}", "PIP_LOG": str(self.pip_log)} | variables,
            cwd=self.bin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, script: str = "serve", **variables: str) -> tuple[int, str, str]:
        """A script's exit status, its output and its errors."""
        process = self.start(*arguments, script=script, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def serve(self, *arguments: str, **variables: str) -> dict[str, object]:
        """What reached the service."""
        status, out, err = self.run(*arguments, **variables)
        assert status == 0, err
        seen: dict[str, object] = json.loads(out)
        return seen

    @property
    def installs(self) -> list[list[str]]:
        """The arguments of every `pip install`."""
        lines = self.pip_log.read_text().splitlines() if self.pip_log.exists() else []
        return [json.loads(line)[1:] for line in lines]

    def constrained(self, target: str) -> list[str]:
        """The arguments of an installation of the project with the tested versions."""
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
def test_all_arguments_reach_the_service_as_they_are(project: Project, arguments: list[str]) -> None:
    seen = project.serve(*arguments, UNFOG_MAX_BATCH="8")
    assert seen["arguments"] == arguments
    assert seen["settings"] == {"UNFOG_MAX_BATCH": "8"}


def test_the_exit_status_and_the_error_are_those_of_the_service(project: Project) -> None:
    (project.root / "app" / "__main__.py").write_text("import sys\nprint('wrong', file=sys.stderr)\nsys.exit(2)\n")
    project.run()
    assert project.run("--colour") == (2, "", "wrong\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_usage_on_stdout_and_no_set_up(project: Project, flag: str) -> None:
    status, out, err = project.run(flag)
    assert (status, err) == (0, "")
    assert out.startswith("usage: scripts/serve")
    assert not project.venv.exists()


def test_the_service_runs_in_the_callers_folder_so_that_relative_paths_hold(project: Project) -> None:
    (project.bin / "app").mkdir()
    (project.bin / "app" / "__main__.py").write_text("raise SystemExit('the wrong app')")
    assert project.serve()["folder"] == str(project.bin)


def test_a_second_start_installs_nothing(project: Project) -> None:
    project.serve()
    assert project.installs == [project.constrained(".")]
    project.serve()
    assert len(project.installs) == 1


def test_a_start_after_the_gates_set_up_installs_nothing(project: Project) -> None:
    project.run(script="check")  # stops at ruff, which the fake pip does not bring
    assert project.installs == [project.constrained(".[dev]")]
    project.serve()
    assert len(project.installs) == 1


def test_the_gates_set_up_after_a_start_adds_the_extras(project: Project) -> None:
    project.serve()
    project.run(script="check")
    assert project.installs == [project.constrained("."), project.constrained(".[dev]")]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_declaration_installs_again_into_the_same_venv(project: Project, name: str) -> None:
    project.serve()
    (project.venv / "kept").touch()
    with (project.root / name).open("a") as file:
        file.write("\n# changed\n")
    project.serve()
    assert len(project.installs) == 2
    assert (project.venv / "kept").exists()


def test_an_installation_for_another_version_of_python_is_renewed(project: Project) -> None:
    project.serve()
    stamp = project.venv / "stamp-"
    stamp.write_text(f"3 10\n{stamp.read_text().partition(chr(10))[2]}")
    project.serve()
    assert len(project.installs) == 2
    project.serve()
    assert len(project.installs) == 2


def test_another_extra_is_installed_and_has_all_that_the_service_needs(project: Project) -> None:
    script = project.root / "scripts" / "own"
    script.write_text(f"#!/usr/bin/env bash\nset -e\n. '{project.root}/scripts/setup.sh'\nset_up traces\n")
    script.chmod(0o755)
    for _ in range(2):
        assert project.run(script="own")[0] == 0
    project.serve()
    assert project.installs == [project.constrained(".[traces]")]


def test_a_moved_project_installs_again(project: Project) -> None:
    project.serve()
    project.root = project.root.rename(project.root.with_name("elsewhere"))
    project.serve()
    assert len(project.installs) == 2


def test_a_venv_whose_python_is_gone_is_made_anew(project: Project) -> None:
    project.serve()
    (project.venv / "bin" / "python").unlink()
    project.serve()
    assert len(project.installs) == 2


def test_an_install_that_was_killed_is_made_anew(project: Project) -> None:
    status, out, _ = project.run(PIP_ENDING="killed")
    assert (status, out) == (1, "")
    (project.venv / "gone").touch()
    project.serve()
    assert not (project.venv / "gone").exists()


def test_a_package_cut_short_by_an_interrupted_install_is_made_anew(project: Project) -> None:
    project.serve()
    (project.venv / "unfinished").touch()
    next(project.venv.glob("lib/*/site-packages/thing.py")).write_text("pri")
    (project.venv / "gone").touch()
    project.serve()
    assert not (project.venv / "gone").exists()


def test_extras_that_cannot_be_had_leave_the_service_as_it_was(project: Project) -> None:
    project.serve()
    status, _, err = project.run(script="check", PIP_ENDING="no network")
    assert status == 1
    assert "installation failed" in err
    project.serve(PIP_ENDING="no network")
    assert len(project.installs) == 2


def test_two_first_starts_at_once_install_once(project: Project) -> None:
    starts = [project.start(PIP_ENDING="slow") for _ in range(2)]
    errors = [start.communicate(timeout=60)[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0], errors
    assert len(project.installs) == 1


def test_pytorch_comes_from_the_index_that_is_named(project: Project) -> None:
    project.serve(UNFOG_TORCH_INDEX="https://index.example/cpu")
    first, second = project.installs
    assert first[:2] == ["--index-url", "https://index.example/cpu"]
    assert [requirement.split(">")[0] for requirement in first[2:]] == ["torch"]
    assert second == project.constrained(".")


def test_the_gates_torchvision_comes_from_the_index_too(project: Project) -> None:
    project.run(script="check", UNFOG_TORCH_INDEX="https://index.example/cpu")
    assert [requirement.split(">")[0] for requirement in project.installs[0][2:]] == ["torch", "torchvision"]


@pytest.fixture
def plain(project: Project) -> Project:
    """An x86-64 Linux machine without an NVIDIA GPU. `PIP_CONFIGURATION=""` makes its pip unconfigured."""
    project.give("uname", "echo Linux x86_64")
    project.give("nvidia-smi", "exit 9")
    script = project.root / "scripts" / "setup.sh"
    text = script.read_text()
    assert "/dev/nvidiactl" in text
    script.write_text(text.replace("/dev/nvidiactl", f"'{project.bin}/nvidiactl'"))
    return project


def test_without_a_gpu_the_cpu_build_is_installed_and_explained(plain: Project) -> None:
    status, _, err = plain.run(PIP_CONFIGURATION="")
    assert status == 0, err
    first, second = plain.installs
    assert first[:2] == ["--index-url", CPU_INDEX]
    assert [requirement.split(">")[0] for requirement in first[2:]] == ["torch"]
    assert second == plain.constrained(".")
    (line,) = [line for line in err.splitlines() if "NVIDIA" in line]
    assert line.startswith(f"unfog: no NVIDIA GPU found: installing PyTorch's CPU build from {CPU_INDEX}")
    assert "UNFOG_TORCH_INDEX=https://pypi.org/simple" in line
    assert str(plain.venv) in line


def test_a_named_torch_index_overrides_the_automatic_choice(plain: Project) -> None:
    _, _, err = plain.run(PIP_CONFIGURATION="", UNFOG_TORCH_INDEX="https://pypi.org/simple")
    assert plain.installs[0][:2] == ["--index-url", "https://pypi.org/simple"]
    assert "NVIDIA" not in err


@pytest.mark.parametrize(
    "configuration",
    [
        "global.index-url='https://mirror.example/simple'",
        "install.extra-index-url='https://mirror.example/simple'",
        ":env:.find-links='/opt/wheels'\nglobal.cert='/etc/ssl/ca.crt'",
        "global.cert='/etc/ssl/ca.crt'\nglobal.no-index='true'",
    ],
)
def test_a_package_source_in_pips_configuration_is_respected(plain: Project, configuration: str) -> None:
    status, _, err = plain.run(PIP_CONFIGURATION=configuration)
    assert status == 0, err
    assert plain.installs == [plain.constrained(".")]
    assert "installing PyTorch from the sources in pip's configuration" in err


@pytest.mark.parametrize(
    "configuration", ["global.cert='/index-url=/ca.crt'", ":env:.default-timeout='180'", "global.constraint='/c.txt'"]
)
def test_other_pip_configuration_does_not_prevent_the_cpu_build(plain: Project, configuration: str) -> None:
    plain.serve(PIP_CONFIGURATION=configuration)
    assert [install[:2] for install in plain.installs[:-1]] == [["--index-url", CPU_INDEX]]


@pytest.mark.parametrize("sign", ["nvidia-smi", "nvidiactl"])
def test_with_a_gpu_the_download_of_the_cuda_build_is_announced(plain: Project, sign: str) -> None:
    plain.give(sign, "exit 0")
    status, _, err = plain.run(PIP_CONFIGURATION="")
    assert status == 0, err
    assert plain.installs == [plain.constrained(".")]
    (line,) = [line for line in err.splitlines() if "NVIDIA" in line]
    assert line.startswith("unfog: NVIDIA GPU found: downloading PyTorch's CUDA build (several GB)")
    assert f"UNFOG_TORCH_INDEX={CPU_INDEX}" in line


@pytest.mark.parametrize("machine", ["Linux aarch64", "Darwin arm64"])
def test_other_platforms_use_pips_default_index(plain: Project, machine: str) -> None:
    plain.give("uname", f"echo {machine}")
    _, _, err = plain.run(PIP_CONFIGURATION="")
    assert plain.installs == [plain.constrained(".")]
    assert "NVIDIA" not in err


def test_an_installed_cpu_build_gets_its_torchvision_from_the_cpu_index(plain: Project) -> None:
    plain.serve(PIP_CONFIGURATION="", PIP_TORCH="2.13.0+cpu")
    plain.give("nvidia-smi", "exit 0")
    _, _, err = plain.run(script="check", PIP_CONFIGURATION="")
    assert [install[:2] for install in plain.installs[-2:]] == [
        ["--index-url", CPU_INDEX],
        plain.constrained(".[dev]")[:2],
    ]
    assert [requirement.split(">")[0] for requirement in plain.installs[-2][2:]] == ["torch", "torchvision"]
    assert "NVIDIA" not in err


def test_an_installed_cuda_build_is_kept_without_a_gpu(plain: Project) -> None:
    plain.serve(PIP_TORCH="2.13.0")
    _, _, err = plain.run(script="check", PIP_CONFIGURATION="")
    assert plain.installs == [plain.constrained("."), plain.constrained(".[dev]")]
    assert "NVIDIA" not in err


def test_ctrl_c_before_a_package_has_changed_keeps_the_venv(project: Project) -> None:
    project.serve()
    declared = project.pyproject.read_text()
    project.pyproject.write_text(f"{declared}# a change\n")
    status, out, _ = project.run(PIP_ENDING="interrupted")
    assert status
    assert out == ""
    project.pyproject.write_text(declared)
    assert project.serve(PIP_ENDING="no network")


def test_a_python_that_is_too_old_is_one_sentence(project: Project) -> None:
    for name in PYTHONS:
        # Its answer to `-c`, be the question its version or its modules.
        project.give(name, "exit 1")
    status, out, err = project.run()
    assert (status, out) == (1, "")
    assert err.startswith("unfog: no Python 3.11 or newer found (tried: python3 ")
    assert err.endswith("). Install python3 and python3-venv\n")
    assert len(err.splitlines()) == 1


def test_a_missing_venv_module_is_one_sentence_with_the_package(project: Project) -> None:
    for name in PYTHONS:
        project.give(name, f"""case "$2" in *ensurepip*) exit 1 ;; *) exec "{sys.executable}" "$@" ;; esac""")
    status, out, err = project.run()
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "python3-venv" in err


def test_a_newer_python_beside_an_old_one_is_found(project: Project) -> None:
    project.give("python3", "exit 1")
    for name in PYTHONS[2:]:
        project.give(name, "exit 127")
    project.serve()
    assert len(project.installs) == 1
