"""The reference names all that is there: verbs and their options, options of formats, Python names,
keys of JSON, environment variables.  The site itself is built where there is time for it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from io import IOBase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diskwright
from cli.support import ours
from diskwright import aio, errors
from diskwright.graph.registry import BUILTIN
from diskwright.ops.gates import FileObject

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"


def page(name: str) -> str:
    return (REFERENCE / f"{name}.md").read_text()


@pytest.fixture(scope="module")
def declared() -> ModuleType:
    """What the site makes the tables of."""
    spec = spec_from_file_location("declared", ROOT / "docs" / "_ext" / "declared.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_verb_and_every_option(declared: ModuleType) -> None:
    text = page("cli")
    titles = re.findall(r"^## (.+)", text, re.MULTILINE)
    assert titles == sorted(declared.VERBS)
    for verb in declared.VERBS:
        assert f"```{{verb}} {verb}\n```" in text
        made = declared.verb_text(verb) + declared.verb_text("common")
        for option in declared.declared(verb):
            assert f"--{option.long}" in made if option.long else f"-{option.short}" in made
            # An option that --help leaves out is another name of one that it shows.
            assert option.help or (verb, option.long) in {
                ("convert", "source-image-opts"),
                ("serve", "aio"),
            }


def test_every_driver_and_every_option_of_it(declared: ModuleType) -> None:
    text = page("options")
    same = {"host_device": "file", "null-aio": "null-co"}
    for name in BUILTIN:
        assert f"`{name}`" in text if name in same else f"{{format-options}} {name}\n" in text
        made = declared.format_text(name)
        for _, options in declared.driver_options(name):
            for option in options:
                assert f"| `{option.name}` |" in made
                assert option.help, f"{name}: the option '{option.name}' is not explained"


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def test_every_name_of_the_python_api() -> None:
    elsewhere = {IOBase, FileObject, pytest.importorskip("fsspec").AbstractFileSystem}
    text = page("python")
    named = set(re.findall(r"auto(?:function|class):: ([\w.]+)", text))
    for name in diskwright.__all__:
        value = getattr(diskwright, name)
        if not inspect.ismodule(value):
            assert {f"diskwright.{name}", f"{value.__module__}.{name}"} & named, name
    assert {"diskwright.aio.open", "diskwright.aio.Disk"} <= named
    for path in named:
        module, _, name = path.rpartition(".")
        value = getattr(import_module(module), name)
        assert inspect.getdoc(value), path
        # What files of Python and file systems of fsspec can do is told there.
        if inspect.isclass(value) and not elsewhere & {*value.__mro__}:
            for member in public(value):
                found: Any = inspect.getattr_static(value, member)
                if inspect.isfunction(found) or isinstance(found, property):
                    assert inspect.getdoc(found), f"{path}.{member}"
    for name in public(type("all", (), vars(errors))):
        value = getattr(errors, name)
        if inspect.isclass(value) and issubclass(value, errors.DiskError):
            assert value.__doc__, name


def test_both_apis_have_the_same_signatures() -> None:
    for name in diskwright.ops.calls.OPERATIONS:
        signature = inspect.signature(getattr(diskwright, name))
        assert "driver" not in signature.parameters, name
        assert signature == inspect.signature(getattr(aio, name)), name


def keys(value: Any) -> set[str]:
    """Of all objects in it, but not of what a format tells of itself."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    if isinstance(value, dict):
        return set(value).union(*(keys(v) for k, v in value.items() if k != "format-specific"))
    return set()


def test_every_key_of_json(tmp_path: Path) -> None:
    known = set(re.findall(r"`([\w-]+)`", page("json") + (ROOT / "docs/inspect.md").read_text()))
    diskwright.create(tmp_path / "disk", format="qcow2", size=1 << 20)
    with diskwright.open(tmp_path / "disk", writable=True) as disk:
        disk.write_at(0, b"x")
        disk.snapshots.create("one")
    diskwright.overlay(tmp_path / "disk", tmp_path / "top")
    for words in (
        ["info", "--output=json", "--backing-chain", "top"],
        ["info", "--output=json", "disk"],
        ["map", "--output=json", "top"],
        ["check", "--output=json", "disk"],
        ["check", "--output=json", "--dry-run", "-r", "all", "disk"],
        ["measure", "--output=json", "-O", "qcow2", "top"],
        ["digest", "--output=json", "top"],
        ["inspect", "--json", "top"],
        ["compare", "--output=json", "top", "disk"],
    ):
        done = ours(*words, cwd=tmp_path, name="diskwright")
        found = keys(json.loads(done.out)) - {"sha256", "refcount-bits"}
        if words[0] == "inspect":
            found -= keys(json.loads(done.out)["features"])
        assert not found - known, (words, found - known)


def test_every_environment_variable() -> None:
    known = set(re.findall(r"DISKWRIGHT_\w+", page("environment")))
    used = set()
    for path in (ROOT / "src").rglob("*.py"):
        used |= set(re.findall(r"DISKWRIGHT_[A-Z_]+", path.read_text()))
    assert used == known


@pytest.mark.long
def test_the_site_builds_and_reaches_nobody(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*build, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"""(?:src=|<link[^>]*href=|url\()["']?(\w+:)?//""", path.read_text())
        assert not loaded, f"{path.name} loads something from elsewhere"
