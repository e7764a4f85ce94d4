"""The import order of the rooms, and the stop signs of the design."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from house.rooms import ALLOWED, BASE, PACKAGE, Module, imports, modules, room_of

MODULES = list(modules())
IDS = [m.name for m in MODULES]

# Modules past 400 lines, and why no room is missing.
LONG = {
}


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_a_room_imports_only_rows_above_it(module: Module) -> None:
    assert module.room in ALLOWED, f"{module.path} is in no room"
    wrong = []
    for found in imports(module):
        name = found.module
        if name == "diskwright":
            continue  # the version
        if not name.startswith("diskwright."):
            top = name.split(".")[0]
            # Nobody but pytest and fsspec imports what is made for them.
            if (top, module.name) in (("pytest", "testing.plugin"), ("fsspec", "fs")):
                continue
            assert top in sys.stdlib_module_names, (
                f"{module.path}:{found.line} imports {name}, which is not in the standard library"
            )
            continue
        name = name.removeprefix("diskwright.")
        target = room_of(name)
        if target in (module.room, "base"):
            continue
        allowed = any(name == p or name.startswith(p + ".") for p in ALLOWED[module.room])
        if not allowed:
            wrong.append(f"{module.path.relative_to(PACKAGE)}:{found.line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_base_has_only_the_known_modules() -> None:
    top = {m.name for m in MODULES if "." not in m.name and m.path.parent == PACKAGE}
    assert top - BASE <= {"__init__", "__main__", "api", "aio", "fs"}


def test_asyncio_stays_behind_its_bridge() -> None:
    wrong = []
    for module in MODULES:
        if module.room == "testing" or module.name in ("aio", "engine.aio_driver"):
            continue
        for found in imports(module):
            name = found.module
            if name == "asyncio" or name.startswith("asyncio."):
                wrong.append(f"{module.path}:{found.line} imports asyncio")
            if name.startswith("diskwright.engine.aio_driver") and not found.lazy:
                wrong.append(f"{module.path}:{found.line} imports the asyncio driver at once")
    assert not wrong, "\n".join(wrong)


PURE = [m for m in MODULES if m.room in ("formats", "wire", "codecs", "base")]
HANDLES = {
    "asyncio", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "select", "selectors",
    "shutil", "socket", "subprocess", "tempfile", "threading", "time",
}  # fmt: skip


@pytest.mark.parametrize("module", PURE, ids=[m.name for m in PURE])
def test_formats_and_wire_are_pure_machines(module: Module) -> None:
    """They never wait, and hold no handle: bytes come in and go out."""
    for node in ast.walk(module.tree):
        where = f"{module.path}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(
            node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith
        ), f"{where} awaits"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"{where} opens a handle"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            # Names in images are bytes; these two are pure.
            assert node.attr in ("fsencode", "fsdecode"), f"{where} uses os.{node.attr}"
    for found in imports(module):
        if found.module == "os":
            continue
        assert found.module.split(".")[0] not in HANDLES, (
            f"{module.path}:{found.line} imports {found.module}"
        )


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.room == "formats"], ids=lambda m: m.name
)
def test_commit_and_abort_cannot_raise(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("commit", "abort"):
            raised = [n.lineno for n in ast.walk(node) if isinstance(n, ast.Raise | ast.Assert)]
            assert not raised, f"{module.path}:{raised}: {node.name} raises"


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_modules_stay_readable(module: Module) -> None:
    lines = module.path.read_text().count("\n")
    assert lines <= 400 or module.name in LONG, f"{module.path} has {lines} lines"


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_every_module_says_what_it_is_and_leaves_nothing_open(module: Module) -> None:
    text = module.path.read_text()
    if text.strip():
        assert ast.get_docstring(module.tree), f"{module.path} has no docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text), f"{module.path} leaves something open"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "__getattr__":
            continue
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            raise AssertionError(f"{module.path}:{node.lineno}: a bare except")


def test_type_checkers_are_never_silenced_wholesale() -> None:
    for module in MODULES:
        text = module.path.read_text()
        bare = re.search(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!:)|#\s*ruff:\s*noqa(?!:)", text)
        assert not bare, f"{module.path}: {bare and bare.group()}"
