"""All files state the same time for compiling: for GPU kernels, and for the step on a CPU."""

import re

from tests.docs.markdown import DOCUMENTS, ROOT

FILES = [*DOCUMENTS, ROOT / "Dockerfile", *sorted(ROOT.glob("deploy/kubernetes/**/*.yaml"))]
ON_A_GPU = re.compile(r"compil[^.\n]*? up to (\w+) (?:s|seconds|minutes)\b")
ON_A_CPU = re.compile(r"compiles?\b[^.\n]*? (\d+ to \d+) (?:s|seconds)\b")


def found(pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Returns the stated times by file."""
    return {str(path.relative_to(ROOT)): times for path in FILES if (times := pattern.findall(path.read_text()))}


def test_every_file_states_the_same_time_for_compiling_gpu_kernels() -> None:
    stated = found(ON_A_GPU)
    assert {"Dockerfile", "deploy/kubernetes/README.md", "docs/configuration.md", "docs/deployment.md"} <= set(stated)
    assert {time for times in stated.values() for time in times} == {"4"}


def test_every_document_states_the_same_time_for_compiling_on_a_cpu() -> None:
    stated = found(ON_A_CPU)
    assert {"README.md", "docs/configuration.md", "docs/operations.md", "docs/evaluate.md"} <= set(stated)
    assert {time for times in stated.values() for time in times} == {"30 to 60"}
