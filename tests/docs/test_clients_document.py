"""docs/clients.md and examples/README.md: their code is that of the examples, and no example is missing."""

import re
import stat
import textwrap

import pytest

from tests.docs.document import Document, Example, codes
from tests.docs.markdown import ROOT, links

EXAMPLES = ROOT / "examples"
TABLE = EXAMPLES / "README.md"
FILES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file() and path != TABLE)
PROGRAMS = [name for name in FILES if not name.endswith(".ipynb")]
TEXTS = {name: (EXAMPLES / name).read_text() for name in PROGRAMS}
PAGE = Document("clients.md")
ROWS = {
    row["File"].partition("](")[2].rstrip(")"): row
    for row in Document("../examples/README.md").table("Examples", "File")
}
SCRIPTS = PAGE.section("curl") + PAGE.section("Load tests")  # their code is from the shell scripts
EXCERPTS = [
    *PAGE.examples("python"),
    *PAGE.examples("js"),
    *(example for example in PAGE.examples("bash") if example.text in SCRIPTS),
]


def header(name: str) -> str:
    """Returns the docstring or the first comment of a program."""
    if name.endswith(".py"):
        return TEXTS[name].split('"""')[1]
    lines = TEXTS[name].removeprefix("#!/usr/bin/env bash\n").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith(("#", "//")))
    return "\n".join(lines[:end])


def test_every_example_is_in_the_table_and_in_the_document() -> None:
    assert sorted(ROWS) == FILES
    assert {f"../examples/{name}" for name in FILES} <= {*links(ROOT / "docs/clients.md")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_table_has_the_install_and_run_commands_of_the_program(name: str) -> None:
    (run,) = codes(ROWS[name]["Run"])
    assert run in header(name)
    installed = re.findall(r"Install: +(.*)", header(name))
    assert installed == [code for code in codes(ROWS[name]["Install"]) if code.startswith(("pip ", "npm "))]


@pytest.mark.parametrize("name", PROGRAMS)
def test_document_has_the_install_command_of_the_program(name: str) -> None:
    for command in re.findall(r"Install: +(.*)", header(name)):
        assert f"`{command}`" in PAGE.text


@pytest.mark.parametrize("example", EXCERPTS, ids=lambda example: f"line-{example.line}")
def test_code_of_the_document_is_an_excerpt_of_an_example(example: Example) -> None:
    found = [name for name, text in TEXTS.items() if contains(text, example.text)]
    assert found


def contains(text: str, excerpt: str) -> bool:
    """True if the lines of the excerpt follow each other in the text, where they may be indented further."""
    lines, wanted = text.splitlines(), excerpt.splitlines()
    parts = ("\n".join(lines[i : i + len(wanted)]) for i in range(len(lines) - len(wanted) + 1))
    return any(textwrap.dedent(part) == excerpt.rstrip("\n") for part in parts)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.endswith(".sh")])
def test_shell_script_is_executable(name: str) -> None:
    assert (EXAMPLES / name).stat().st_mode & stat.S_IXUSR
