"""Start-up is a feature: scripts run the tools in loops, so what is imported is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

# Costly to import, and never needed for the common path.
HEAVY = {
    "argparse", "asyncio", "concurrent.futures", "ctypes", "dataclasses", "difflib", "email",
    "importlib.metadata", "inspect", "logging", "multiprocessing", "numpy", "pathlib", "pickle",
    "random", "socket", "ssl", "subprocess", "tempfile", "typing_extensions", "unittest", "urllib",
    "uuid", "zipfile",
}  # fmt: skip

PROBE = """
import sys
bare = set(sys.modules)
import json as j
{code}
j.dump(sorted(set(sys.modules) - bare), open({out!r}, "w"))
"""


def imported(code: str, folder: Path) -> set[str]:
    """The modules that ``code`` adds to a bare interpreter (json, which the probe uses, apart)."""
    out = folder / "modules.json"
    script = PROBE.format(code=code, out=str(out))
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, env=ENV, cwd=folder, stdout=subprocess.DEVNULL)
    names: list[str] = json.loads(out.read_text())
    unseen = ("json", "json.", "_json", "typing.")
    return {n for n in names if not n.startswith(unseen)}


def run_main(*words: str) -> str:
    return (
        "from diskwright.cli.main import main\n"
        f"try:\n    main('diskwright', {list(words)!r})\nexcept SystemExit:\n    pass"
    )


def test_the_package_itself_costs_nothing(tmp_path: Path) -> None:
    assert imported("import diskwright", tmp_path) <= {"__future__", "typing", "diskwright"} | {
        # of typing
        "collections", "collections.abc", "contextlib", "copyreg", "functools", "itertools",
        "keyword", "operator", "re", "reprlib", "types", "warnings", "_collections", "_functools",
        "_operator", "_typing", "_sre", "enum", "re._casefix", "re._compiler", "re._constants",
        "re._parser", "annotationlib", "ast",
    }  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("startup") / "disk.qcow2"
    subprocess.run(
        [sys.executable, "-m", "diskwright", "create", "-q", "-f", "qcow2", str(path), "1M"],
        check=True,
        env=ENV,
    )
    return path


@pytest.mark.parametrize(
    ("words", "most"),
    [(["--version"], 40), (["info"], 134), (["check"], 142), (["map"], 134)],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_a_command_imports_little(
    words: list[str], most: int, image: Path, tmp_path: Path
) -> None:
    with_image = words if words[0].startswith("-") else [*words, str(image)]
    modules = imported(run_main(*with_image), tmp_path)
    heavy = modules & HEAVY
    assert not heavy, f"{words} imports {sorted(heavy)}"
    assert len(modules) <= most, f"{len(modules)}: {sorted(modules)}"


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["convert", "-O", "qcow2", "{image}", "{copy}"], 153),
        (["compare", "{image}", "{image}"], 138),
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
    copy = run_main("convert", "-O", "raw", str(image), str(tmp_path / "copy"))
    code = f"import sys\n{copy}\nassert not {{'json', 'diskwright.codecs'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV, cwd=tmp_path)


def test_the_synchronous_api_does_without_asyncio(image: Path, tmp_path: Path) -> None:
    code = f"import diskwright\nwith diskwright.open({str(image)!r}) as d: d.read_at(0, 512)"
    modules = imported(code, tmp_path)
    assert "asyncio" not in modules
    assert len(modules) <= 122, f"{len(modules)}: {sorted(modules)}"
