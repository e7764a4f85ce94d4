"""The rooms of the package and what each may import: the table of docs/design.md as data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "diskwright"

BASE = {
    "errors", "units", "extents", "ondisk", "contract", "abilities", "declare", "findings",
    "secrets", "authz", "bits", "bitmaps", "tableless", "records", "hints",
}  # fmt: skip

# Room -> prefixes (below the package) that its modules may import, besides themselves and base.
_ENGINE = ("engine", "codecs")
_GRAPH = (*_ENGINE, "protocols", "wire", "graph")
_FILTERS = (*_GRAPH, "filters")
_JOBS = (*_FILTERS, "jobs")
_OPS = (*_JOBS, "ops")
ALLOWED: dict[str, tuple[str, ...]] = {
    "base": (),
    "codecs": (),
    "wire": (),
    "formats": ("codecs",),
    "engine": ("codecs",),
    "protocols": ("wire", "engine.kernel", "engine.node", "engine.leases"),
    "graph": _GRAPH,
    "filters": _FILTERS,
    "jobs": _JOBS,
    "ops": _OPS,
    "export": (*_ENGINE, "protocols", "wire", "graph"),
    "api": (*_OPS, "export"),
    "aio": (*_OPS, "export", "api"),
    "fs": (*_OPS, "api"),
    "monitor": (*_OPS, "export", "api", "aio"),
    "console": ("wire",),
    "cli": (*_OPS, "export", "api", "aio", "monitor", "console", "formats"),
    "testing": (*_OPS, "export", "api", "aio", "monitor", "console", "formats", "cli"),
    # The package itself offers the API, and `python -m` the command line.
    "top": ("api", "aio", "cli"),
}


class Import(NamedTuple):
    """One import statement's target, as a dotted name from the package's root."""

    module: str
    line: int
    lazy: bool
    """Inside a function, or only for the type checker."""


class Module(NamedTuple):
    name: str
    path: Path
    room: str
    tree: ast.Module


def room_of(name: str) -> str:
    head = name.split(".")[0]
    if head in ("__init__", "__main__", ""):
        return "top"
    return "base" if head in BASE else head


def modules() -> Iterator[Module]:
    """Every module of the package; ``name`` is dotted, from the package's root."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        name = ".".join(parts)
        yield Module(name, path, room_of(name), ast.parse(path.read_text(), str(path)))


def known(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _targets(module: Module, node: ast.AST) -> Iterator[str]:
    """Absolute names: ``diskwright.x.y`` or of others."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
        return
    assert isinstance(node, ast.ImportFrom)
    base = node.module or ""
    if node.level:
        package = ["diskwright", *([] if module.name == "__init__" else module.name.split("."))]
        if module.path.name != "__init__.py":
            package.pop()
        package = package[: len(package) - (node.level - 1)]
        base = ".".join([*package, base] if base else package)
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        is_module = inner.startswith("diskwright.") and known(inner.removeprefix("diskwright."))
        yield inner if is_module else base


def imports(module: Module) -> Iterator[Import]:
    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inside = True
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in _targets(module, child):
                    yield Import(target, child.lineno, lazy)
            else:
                yield from walk(child, inside)

    yield from walk(module.tree, False)
