"""What all tests share: the real programs that they compare with, and where the tree is."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from nbd.pki import make_certificates
from peers import find_peer, missing

# Whoever runs the tests may have a configuration of their own.
os.environ["DISKWRIGHT_CONFIG"] = ""

ROOT = Path(__file__).resolve().parent.parent

# How long an example takes depends on what else the machine does; and what CI finds wrong must be
# wrong again at the next attempt.
settings.register_profile("suite", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the soaks and wide sweeps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    soaks = [item for item in items if "long" in item.keywords]
    if soaks:
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if "long" not in item.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that skips for want of a program or a library has failed: all of them can be
    installed."""
    report = yield
    fail_for_want(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same where a whole module skips."""
    report = yield
    fail_for_want(report)
    return report


def fail_for_want(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and os.environ.get("CI") == "true":
        reason = report.longrepr[2]
        # The second are the words of pytest.importorskip.
        if "not installed" in reason or "could not import" in reason:
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid}: {reason}"


@pytest.fixture(scope="session")
def peer() -> Callable[[str], str]:
    """``peer("qemu-img")``: the path of a program that we did not write."""
    found: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in found:
            found[name] = find_peer(name)
        return found[name]

    return get


@pytest.fixture(scope="session")
def certificates(peer: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of them; see :func:`nbd.pki.make_certificates`.  Nobody changes it."""
    peer("openssl")
    folder = tmp_path_factory.mktemp("pki")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="session")
def libnbd_python() -> str:
    """An interpreter that can import libnbd's binding (Debian builds it for its own Python)."""
    for python in ("/usr/bin/python3", shutil.which("python3") or ""):
        if python and Path(python).exists():
            probe = subprocess.run([python, "-c", "import nbd; nbd.NBD"], capture_output=True)
            if probe.returncode == 0:
                return python
    missing("libnbd's Python binding", "python3-libnbd")
    raise AssertionError


def wheel(module: str, package: str) -> ModuleType:
    """A library of others; the extra `dev` has it where there is a wheel of it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        text = f"{package} is not installed (in the extra `dev`)"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


@pytest.fixture(scope="session")
def libvhdi() -> ModuleType:
    """A reader of VHDX that we did not write."""
    return wheel("pyvhdi", "libvhdi-python")


@pytest.fixture(scope="session")
def libvmdk() -> ModuleType:
    """A reader of VMDK that we did not write."""
    return wheel("pyvmdk", "libvmdk-python")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Images that other programs wrote; they lie beside the checkout and are not part of it."""
    folder = ROOT.parent / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no sample images at {folder}")
    return folder
