"""What the documents say is true: the README's examples run, and links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **{k: v for k, v in os.environ.items() if k != "DISKWRIGHT_POLICY"},
    "PYTHONPATH": str(ROOT / "src"),
}
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def examples() -> list[tuple[str, str]]:
    """The fenced blocks of the README as (language, text)."""
    return re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def real(line: str) -> list[str]:
    words = shlex.split(line)
    if words[0] == "diskwright":
        return [sys.executable, "-m", "diskwright", *words[1:]]
    return words


def test_the_five_examples_run_in_their_order(peer: Callable[[str], str], tmp_path: Path) -> None:
    found = examples()
    assert len(found) == 5
    peer("nbdinfo")
    background: list[subprocess.Popen[bytes]] = []
    try:
        for language, text in found:
            if language == "python":
                subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=ENV, check=True)
                continue
            for line in text.splitlines():
                assert line.startswith("$ "), line
                command = line.removeprefix("$ ")
                if command.endswith(" &"):
                    process = subprocess.Popen(real(command[:-2]), cwd=tmp_path, env=ENV)
                    background.append(process)
                    limit = time.monotonic() + 20
                    while not (tmp_path / "disk.sock").exists() and time.monotonic() < limit:
                        time.sleep(0.02)
                    continue
                done = subprocess.run(
                    real(command), cwd=tmp_path, env=ENV, capture_output=True, timeout=60
                )
                assert done.returncode == 0, (command, done.stdout, done.stderr)
            for process in background:  # it ends with its last client
                assert process.wait(20) == 0
            background.clear()
    finally:
        for process in background:
            process.kill()


def test_the_python_examples_run_in_their_order(tmp_path: Path) -> None:
    pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    # What an entry point does where the package is installed.
    known = 'fsspec.register_implementation("diskwright", "diskwright.fs.DiskFileSystem", True)\n'
    code = "\n".join(["import fsspec", known, *blocks])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, check=True, timeout=100)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


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
