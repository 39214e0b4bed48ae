"""The site of the documents: every document is a page, and broken links end the build."""

import re
from pathlib import Path

import pytest

from scripts.common.errors import ScriptError
from scripts.site import build, main
from tests.docs.markdown import DOCUMENTS, ROOT

REPOSITORY = "https://example.com/owner/unfog"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    main(["--out", str(folder), "--repository", REPOSITORY])
    return folder


def page_of(folder: Path, document: Path) -> Path:
    path = document.relative_to(ROOT)
    name = path.parent if path.stem == "README" else path.with_suffix("")
    return folder / name / "index.html"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_document_has_a_page_with_its_title(built: Path, document: Path) -> None:
    title = document.read_text().partition("\n")[0].removeprefix("# ").replace("`", "")
    found, *_ = re.findall(r"<h1[^>]*>(.*?)<a class=\"headerlink", page_of(built, document).read_text())
    assert re.sub("<[^>]*>", "", found) == title


def test_link_to_a_source_file_leads_to_the_repository(built: Path) -> None:
    text = page_of(built, ROOT / "docs/inside.md").read_text()
    assert f'href="{REPOSITORY}/blob/main/app/engine/batcher.py"' in text


def test_page_loads_nothing_from_another_host(built: Path) -> None:
    loading = re.compile(r"<(?:script|img|iframe)[^>]* src=\"(\S+?)\"|<link rel=\"stylesheet\" href=\"(\S+?)\"")
    for page in built.rglob("*.html"):
        loaded = [url for pair in loading.findall(page.read_text()) for url in pair if url]
        assert len(loaded) > 2
        assert [url for url in loaded if "://" in url] == [], page


def test_search_finds_a_setting(built: Path) -> None:
    assert "UNFOG_MAX_BATCH" in (built / "search/search_index.json").read_text()


@pytest.mark.parametrize(("target", "named"), [("#nowhere", "nowhere"), ("b.md#nowhere", "nowhere"), ("c.py", "c.py")])
def test_broken_link_ends_the_build(target: str, named: str, tmp_path: Path) -> None:
    config = (ROOT / "docs/mkdocs.yml").read_text().partition("nav:")[0]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/b.md").write_text("# B\n")
    (tmp_path / "docs/README.md").write_text("# A\n\n[link](b.md#b)\n")
    build(tmp_path, config, tmp_path / "site", "")
    (tmp_path / "docs/README.md").write_text(f"# A\n\n[link]({target})\n")
    with pytest.raises(ScriptError, match=named):
        build(tmp_path, config, tmp_path / "site", "")


def test_document_that_is_missing_in_the_navigation_ends_the_build(tmp_path: Path) -> None:
    config = (ROOT / "docs/mkdocs.yml").read_text().partition("nav:")[0] + "nav: [README.md]\n"
    (tmp_path / "README.md").write_text("# A\n")
    build(tmp_path, config, tmp_path / "site", "")
    (tmp_path / "B.md").write_text("# B\n")
    with pytest.raises(ScriptError, match=r"B\.md"):
        build(tmp_path, config, tmp_path / "site", "")
