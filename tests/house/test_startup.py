"""Start-up is a feature: scripts run the tools in loops, so what is imported is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diskwright.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

# Costly to import, and never needed for the common path.
HEAVY = {
    "argparse", "asyncio", "concurrent.futures", "ctypes", "dataclasses", "difflib", "email",
    "importlib.metadata", "inspect", "json", "logging", "multiprocessing", "numpy", "pathlib",
    "pickle", "random", "socket", "ssl", "subprocess", "tempfile", "typing", "typing_extensions",
    "unittest", "urllib", "uuid", "zipfile",
}  # fmt: skip

# What the verbs that only look at an image do without, too: for the shortest runs each of these
# costs as much as a tenth to a third of the interpreter's own start.
DEAR = {"contextlib", "enum", "functools", "re", "selectors", "signal", "threading", "weakref"}

PROBE = """
import sys
bare = set(sys.modules)
{code}
open({out!r}, "w").write("\\n".join(set(sys.modules) - bare))
"""


def imported(code: str, folder: Path) -> set[str]:
    """The modules that ``code`` adds to a bare interpreter."""
    out = folder / "modules.txt"
    script = PROBE.format(code=code, out=str(out))
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, env=ENV, cwd=folder, stdout=subprocess.DEVNULL)
    return set(out.read_text().split("\n"))


def run_main(*words: str) -> str:
    return (
        "from diskwright.cli.main import main\n"
        f"try:\n    main('diskwright', {list(words)!r})\nexcept SystemExit:\n    pass"
    )


def test_the_package_itself_costs_nothing(tmp_path: Path) -> None:
    assert imported("import diskwright", tmp_path) == {
        "__future__",
        "diskwright",
        "diskwright.hints",
    }


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 image; beside it is a raw one, with another suffix."""
    path = tmp_path_factory.mktemp("startup") / "disk.qcow2"
    assert main("diskwright", ["create", "-q", "-f", "qcow2", str(path), "1M"]) == 0
    path.with_suffix(".raw").write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["--version"], 23),
        (["info", "{raw}"], 85),
        (["info", "{image}"], 97),
        (["map", "{image}"], 99),
        (["snapshot", "-l", "{image}"], 96),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else "",
)
def test_who_only_looks_imports_least(
    words: list[str], most: int, image: Path, tmp_path: Path
) -> None:
    """``info`` is to take less than three times as long as a bare interpreter
    (``bench/start.py``); each module costs it about a hundredth of that."""
    filled = [word.format(image=image, raw=image.with_suffix(".raw")) for word in words]
    modules = imported(run_main(*filled), tmp_path)
    heavy = modules & (HEAVY | DEAR)
    assert not heavy, f"{words} imports {sorted(heavy)}"
    assert len(modules) <= most, f"{len(modules)}: {sorted(modules)}"
    writing = {f"diskwright.engine.{name}" for name in ("allocate", "pool", "write", "zero")}
    writing |= {f"diskwright.formats.qcow2.{name}" for name in ("format", "machine.alloc")}
    assert not modules & writing, "what is only read is no place for what writes"


def test_check_imports_little(image: Path, tmp_path: Path) -> None:
    modules = imported(run_main("check", str(image)), tmp_path)
    assert not modules & HEAVY
    assert len(modules) <= 121, f"{len(modules)}: {sorted(modules)}"


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["convert", "-O", "qcow2", "{image}", "{copy}"], 147),
        (["compare", "{image}", "{image}"], 105),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_what_goes_over_two_disks_imports_little(
    words: list[str], most: int, image: Path, tmp_path: Path
) -> None:
    filled = [word.format(image=image, copy=tmp_path / "copy") for word in words]
    modules = imported(run_main(*filled), tmp_path)
    assert not modules & HEAVY
    assert len(modules) <= most, f"{len(modules)}: {sorted(modules)}"


def test_a_command_imports_only_its_own_drivers(image: Path, tmp_path: Path) -> None:
    modules = imported(run_main("info", str(image)), tmp_path)
    assert "diskwright.formats.qcow2" in modules
    for room in ("wire", "export", "filters", "testing"):
        assert not {m for m in modules if m.startswith(f"diskwright.{room}.")}, room
    others = {"null", "memory"} & {m.removeprefix("diskwright.protocols.") for m in modules}
    assert not others


def test_plain_names_do_without_json(image: Path, tmp_path: Path) -> None:
    modules = imported(
        run_main("convert", "-O", "raw", str(image), str(tmp_path / "copy")), tmp_path
    )
    assert not {"json", "diskwright.codecs"} & modules


def test_the_synchronous_api_does_without_asyncio(image: Path, tmp_path: Path) -> None:
    code = f"import diskwright\nwith diskwright.open({str(image)!r}) as d: d.read_at(0, 512)"
    modules = imported(code, tmp_path)
    assert "asyncio" not in modules
    assert len(modules) <= 107, f"{len(modules)}: {sorted(modules)}"


def test_a_daemon_imports_what_it_is_asked_for(image: Path, tmp_path: Path) -> None:
    """Who mounts a disk by it waits for it; and no driver is needed but those that are named."""
    disk = f"driver=file,node-name=disk,filename={image}"
    words = ("daemon", "--blockdev", disk, "--export", "fuse,id=e,node-name=disk,mountpoint=none")
    modules = imported(run_main(*words), tmp_path)
    assert "diskwright.export.fuse_mount" in modules
    nbd = ("diskwright.export.nbd_", "diskwright.wire.nbd_", "diskwright.protocols.nbd")
    assert {name for name in modules if name.startswith(nbd)} == {"diskwright.export.nbd_service"}
    assert not {name for name in modules if name.startswith(("diskwright.formats.", "urllib"))}
