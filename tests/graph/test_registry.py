"""The registry: one driver imported at a time, and drivers of other packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from diskwright.graph import registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(code: str) -> set[str]:
    """The modules of the package that a fresh interpreter has imported after ``code``."""
    text = f"{code}\nimport sys; print(*[m for m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    return set(done.stdout.split())


def test_one_driver_is_imported_at_a_time() -> None:
    Path("a.raw").write_bytes(bytes(1 << 20))
    diskwright.create("a.qcow2", format="qcow2", size=1 << 20)
    bare = imported("import diskwright")
    ours = {name for name in bare if name.startswith("diskwright")}
    assert ours == {"diskwright", "diskwright.hints"}
    raw = imported("import diskwright\nwith diskwright.open('a.raw') as d: d.read_at(0, 512)")
    assert not [name for name in raw if "qcow2" in name or "memory" in name or "null" in name]
    assert not {"asyncio", "argparse", "importlib.metadata", "selectors"} & raw
    qcow2 = imported("import diskwright\nwith diskwright.open('a.qcow2') as d: d.read_at(0, 512)")
    assert "diskwright.formats.raw" not in qcow2
    assert len([name for name in qcow2 if name.startswith("diskwright")]) < 82


def test_kinds_and_names_are_known_without_importing() -> None:
    loaded = imported(
        "from diskwright.graph import registry\n"
        "assert registry.kind('qcow2') == 'format' and registry.kind('file') == 'protocol'\n"
        "from diskwright.graph.probe import guess; "
        "assert guess(b'QFI\\xfb\\0\\0\\0\\3', b'', True) == 'qcow2'"
    )
    assert not [
        name for name in loaded if name.startswith(("diskwright.formats.", "diskwright.protocols."))
    ]
    assert {"raw", "qcow2"} <= set(registry.names("format"))
    assert "file" not in registry.names("format")
    for name in registry.names():
        assert registry.driver(name).name == name
        assert registry.driver(name).kind == registry.kind(name)


def test_other_packages_offer_drivers_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plug.py").write_text(
        "from diskwright.declare import Driver, Option\n"
        "from diskwright.protocols.memory import MemoryNode\n"
        "async def opened(driver, options):\n"
        "    return MemoryNode(driver, b'plugged in'.ljust(512, b'!'))\n"
        "DRIVER = Driver('plugged', 'protocol', (Option('filename', 'str', ''),), open=opened)\n"
    )
    info = Path("plug-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diskwright.drivers]\nplugged = plug:DRIVER\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    try:
        with diskwright.open({"driver": "raw", "file": {"driver": "plugged"}}) as disk:
            assert disk.read_at(0, 10) == b"plugged in"
        with diskwright.open("plugged:whatever") as disk:
            assert disk.read_at(0, 10) == b"plugged in"
    finally:
        registry.forget("plugged")
