"""Builds the site of the documents with MkDocs: `python -m scripts.site --out build/site`.

The pages are the Markdown files of the repository, at the same paths, so that their links need no change. A link to
another file of the repository, such as a source file, gets the URL of that file in --repository. Without this option,
only its text remains. A broken link or anchor, or a document that is missing in docs/mkdocs.yml, ends the build with
an error.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.common.arguments import Parser
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.progress import require

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("*.md", "docs/**/*.md", "deploy/**/*.md", "examples/*.md")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


@reports_errors("site")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    require("material", extra="docs")
    config = (ROOT / "docs" / "mkdocs.yml").read_text("utf-8")
    build(ROOT, config, args.out, args.repository.rstrip("/"))
    print(f"wrote {args.out}")


def build(root: Path, config: str, out: Path, repository: str) -> None:
    """Builds the site of the documents below `root`. Raises ScriptError with the messages of MkDocs if there are any.

    `config` is the configuration of MkDocs without the settings of this function. `repository` is a URL, or empty.
    """
    with TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        copy_documents(root, pages, repository)
        settings = [f"docs_dir: {pages}", f"site_dir: {out.resolve()}"]
        if repository:
            settings.append(f"repo_url: {repository}")
        path = Path(folder) / "mkdocs.yml"
        path.write_text("\n".join([config, *settings]), "utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        problems = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
        raise ScriptError("\n".join(problems))


def copy_documents(root: Path, pages: Path, repository: str) -> None:
    """Copies all documents and the pictures that they show to the same paths below `pages`."""
    documents = {path for pattern in DOCUMENTS for path in root.glob(pattern) if "node_modules" not in path.parts}
    pictures = set[Path]()
    for document in sorted(documents):

        def link(match: re.Match[str], document: Path = document) -> str:
            kind, text, target = match.groups()
            goal = (document.parent / target.partition("#")[0]).resolve()
            if "://" in target or target.startswith("#") or goal in documents:
                return match[0]
            if not goal.exists():
                raise ScriptError(f"{document.relative_to(root)} links to {target}, which does not exist")
            if kind:
                pictures.add(goal)
                return match[0]
            return f"[{text}]({repository}/blob/main/{goal.relative_to(root)})" if repository else text

        parts = _FENCE.split(document.read_text("utf-8"))
        page = pages / document.relative_to(root)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts), "utf-8")
    for picture in pictures:
        copy = pages / picture.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, copy)


def build_parser() -> Parser:
    parser = Parser("python -m scripts.site", description="Build the site of the documents.")
    parser.add_argument("--out", type=Path, default=Path("build/site"), help="folder of the site (default: build/site)")
    parser.add_argument("--repository", metavar="URL", default="", help="URL of the repository, for links to its files")
    return parser


if __name__ == "__main__":
    main()
