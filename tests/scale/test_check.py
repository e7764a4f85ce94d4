"""Images whose metadata are large: what a check of them reads, and what memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import Machine

from diskwright.formats import qcow2
from diskwright.formats.qcow2.check.scan import pieces
from scale.images import TIB, Layout, make

SOURCE = Path(__file__).resolve().parents[2] / "src"
MEMORY = 256 << 10  # KiB
# A process of its own: the peak of a child begins with what its parent had.
WATCH = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "diskwright", *sys.argv[1:]], capture_output=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, done.stdout.decode(), done.stderr.decode(), peak]))
"""


def run(*arguments: str) -> int:
    """The peak in KiB of a command that must end well."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", WATCH, *arguments],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    code, out, err, peak = json.loads(done.stdout)
    assert code == 0, (out, err)
    return int(peak)


def test_an_empty_disk_of_64_tib_is_read_in_a_few_requests() -> None:
    layout = Layout(64 * TIB)
    tables = -(-8 * layout.tables // layout.cluster)
    file = bytearray(layout.header())
    file[40:48] = (3 << 16).to_bytes(8, "big")
    file[48:60] = (1 << 16).to_bytes(8, "big") + (1).to_bytes(4, "big")
    file.extend(bytes((3 + tables << 16) - len(file)))
    file[1 << 16 : (1 << 16) + 8] = (2 << 16).to_bytes(8, "big")
    file[2 << 16 : (2 << 16) + 2 * (3 + tables)] = b"\0\1" * (3 + tables)
    machine = Machine(bytes(file))
    image = machine.open(qcow2.DRIVER, check=True)
    opened = machine.requests
    found = machine.run(image.check())
    assert not (found.corruptions or found.leaks) and found.passes == 1
    assert opened < 20 and machine.requests - opened < 60, machine.requests
    assert found.bytes_read == 1 << 16  # the only refcount block


@pytest.mark.parametrize("snapshots", [0, 3])
def test_a_full_disk_of_1_tib_is_checked_in_bounded_memory(snapshots: int, tmp_path: Path) -> None:
    image = make(tmp_path / "full.qcow2", Layout(TIB, snapshots=snapshots))
    assert run("check", str(image)) < MEMORY


def test_snapshots_of_a_full_disk_go_by_runs(tmp_path: Path) -> None:
    """2 Mi clusters: what is done for each of them would take half a minute."""
    image = make(tmp_path / "full.qcow2", Layout(TIB // 8))
    for option in ("-c", "-a", "-d"):
        assert run("snapshot", option, "one", str(image)) < MEMORY
    assert run("check", str(image)) < MEMORY


def test_a_large_table_is_one_run() -> None:
    """The time to make its lanes grows with their number, not with its square (which is
    minutes)."""
    layout = Layout(TIB // 2, cluster_bits=21)
    (run,) = pieces(layout.table(0), layout.cluster)
    assert run.at == 0 and run.length == layout.per_table


@pytest.mark.long
def test_a_full_disk_of_64_tib(tmp_path: Path) -> None:
    """Of 2 MiB clusters: 320 MiB of tables, in a file that not every file system can hold."""
    layout = Layout(64 * TIB, cluster_bits=21)
    shared = Path("/dev/shm")
    folder = shared if shared.is_dir() else tmp_path
    image = folder / f"diskwright-{os.getpid()}.qcow2"
    try:
        make(image, layout)
        assert run("check", str(image)) < MEMORY
    except OSError as error:
        pytest.skip(f"the file system holds no file of 64 TiB: {error}")
    finally:
        image.unlink(missing_ok=True)
