"""Tests the documents: links lead to existing files and headings, and every picture is used and described."""

from pathlib import Path

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, anchors, links, prose

NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_existing_files_and_headings(name: str) -> None:
    document = ROOT / name
    for target in links(document):
        if "://" in target:
            assert target.startswith(("https://", "http://localhost")), target
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        assert not anchor or path.suffix != ".md" or anchor in anchors(path), target


def test_every_picture_is_shown_in_a_document() -> None:
    shown = {(path.parent / target).resolve() for path in DOCUMENTS for target in links(path)}
    pictures = {path for suffix in ("png", "svg", "webp") for path in (ROOT / "docs").rglob(f"*.{suffix}")}
    assert pictures <= shown


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_a_description(name: str) -> None:
    assert "![](" not in prose(ROOT / name)


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        if path in reached:
            continue
        reached.add(path)
        targets = [(path.parent / target.partition("#")[0]).resolve() for target in links(path) if "://" not in target]
        todo += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert set(DOCUMENTS) <= reached
