"""The byte tables of the documentation say what the structs of the program do."""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import diskwright
from diskwright.ondisk import Fields

DOCS = Path(__file__).resolve().parents[2] / "docs"
TABLE = r"<!-- {}: (\S+) -->\n\n((?:\|.*\n)+)"


def tables(kind: str) -> list[tuple[str, list[list[str]]]]:
    """All tables below a mark of this kind, as (what the mark names, rows of cells)."""
    found = []
    for page in sorted(DOCS.rglob("*.md")):
        for name, text in re.findall(TABLE.format(kind), page.read_text()):
            rows = [line.strip("|").split("|") for line in text.splitlines()[2:]]
            found.append((name, [[cell.strip(" `") for cell in row] for row in rows]))
    return found


def modules() -> list[ModuleType]:
    """All of the formats, and the format of undo files."""
    import diskwright.formats
    from diskwright.ops import undofile

    below = pkgutil.walk_packages(diskwright.formats.__path__, "diskwright.formats.")
    return [undofile, *(import_module(module.name) for module in below)]


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"diskwright.{module}"), name)


def test_offsets_sizes_and_names_are_those_of_the_structs() -> None:
    found = tables("layout")
    assert found
    for name, rows in found:
        base = int(rows[0][0])
        shown = {field: (int(at) - base, int(size)) for at, size, field, *_ in rows}
        assert list(shown.items()) == list(named(name).places.items()), name


def test_every_struct_of_every_format_has_its_table() -> None:
    documented = {id(named(name)) for name, _ in tables("layout")}
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, Fields):
                assert id(value) in documented, f"{module.__name__}.{name} is not documented"


def test_no_struct_of_a_format_is_without_names() -> None:
    guid, array = '_GUID = struct.Struct("<IHH2s6s")', '_VALUE = struct.Struct(">64Q")'
    for path in (Path(diskwright.__file__).parent / "formats").rglob("*.py"):
        text = path.read_text().replace(guid, "").replace(array, "")
        assert "struct.Struct(" not in text, f"{path} has a struct that is not ondisk.Fields"


def test_bits_are_those_of_the_masks() -> None:
    found = tables("bits")
    assert found
    for module, rows in found:
        for bits, name, *_ in rows:
            first, _, last = bits.partition("-")
            mask = (2 << int(last or first)) - (1 << int(first))
            assert getattr(import_module(f"diskwright.{module}"), name) == mask, name
