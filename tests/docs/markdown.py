"""Reads Markdown documents: fenced code blocks, headings and links."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
    )
    if "node_modules" not in path.parts  # the fonts of examples/draw_letters.py, with documents of their own
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^()\s]+)\)")


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    text: str


def blocks(path: Path, language: str = "") -> list[Block]:
    """Returns the fenced code blocks of a document in order, or only those in `language` if it is given."""
    found = [Block(*match.groups()) for match in _FENCE.finditer(path.read_text())]
    return [block for block in found if language in ("", block.language)]


def commands(path: Path) -> list[str]:
    """Returns the commands of the bash blocks of a document. Continued lines are joined. Comments are removed."""
    lines = "\n".join(block.text for block in blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)# .*", "", line).strip())]


def prose(path: Path) -> str:
    """Returns the text of a document without its code blocks."""
    return _FENCE.sub("", path.read_text())


def links(path: Path) -> list[str]:
    """Returns the targets of the links and pictures of a document."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(path)))


def anchors(path: Path) -> list[str]:
    """Returns the anchors that GitHub gives the headings of a document, in order."""
    found = list[str]()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(next(name for name in (slug, *(f"{slug}-{i}" for i in range(1, 100))) if name not in found))
    return found
