"""What the documents say is true: their examples run, and their links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from house.examples import LANGUAGES, PAGES, ROOT, Session, blocks

README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted({*ROOT.glob("*.md"), *PAGES})


def titled(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


SESSIONS = {page: blocks(page.read_text()) for page in PAGES}


@pytest.mark.parametrize(
    "page",
    [
        page
        for page, found in SESSIONS.items()
        if {"console", "python"} & {b.language for b in found}
    ],
    ids=titled,
)
def test_examples_run(page: Path, peer: Callable[[str], str], tmp_path: Path) -> None:
    pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    # What an entry point does where the package is installed.
    fsspec = pytest.importorskip("fsspec")
    fsspec.register_implementation("diskwright", "diskwright.fs.DiskFileSystem", True)
    session = Session(tmp_path, peer)
    try:
        for block in SESSIONS[page]:
            if block.why is None:
                session.run(block)
    finally:
        session.close()


@pytest.mark.parametrize("page", PAGES, ids=titled)
def test_no_example_goes_untested(page: Path) -> None:
    for block in SESSIONS[page]:
        # Those with braces are made by the site.
        assert block.language in LANGUAGES or block.language.startswith("{"), block
        assert block.why is None or block.why.startswith("needs "), block.why
    text = page.read_text()
    fences = [block for block in SESSIONS[page] if not block.hidden]
    printed = sum(block.printed is not None for block in fences)
    assert text.count("```") == 2 * (len(fences) + printed), "a fence that is not understood"
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"\n\n    \S", outside), "a block without a language"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as the site and repository hosts make them."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", DOCUMENTS, ids=titled)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        found = page.parent / target if target else page
        assert found.exists(), f"a link to {target}"
        if anchor:
            assert anchor in anchors(found.read_text()), f"a link to {target}#{anchor}"


def test_every_page_is_in_the_site() -> None:
    docs = ROOT / "docs"
    pages = {page for page in PAGES if docs in page.parents}
    listed = {docs / "index.md"}
    for page in pages:
        for entries in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in entries.split() if not line.startswith(":")]
            listed |= {page.parent / f"{name}.md" for name in names}
    assert listed >= pages


def test_the_readme_is_one_screen() -> None:
    assert README.count("\n") < 90


def test_the_design_names_the_rooms_that_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    for folder in (ROOT / "src" / "diskwright").iterdir():
        if folder.is_dir() and any(f.name != "__init__.py" for f in folder.glob("*.py")):
            assert f"`{folder.name}/`" in text, f"docs/design.md does not know {folder.name}/"


def test_the_version_has_one_source() -> None:
    import diskwright

    version = re.escape(diskwright.__version__)
    assert re.search(rf"^## {version}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "src").rglob("*.py"):
        if path.name != "__init__.py" or path.parent.name != "diskwright":
            assert not re.search(rf"""["']{version}["']""", path.read_text()), path
