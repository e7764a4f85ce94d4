"""Images whose metadata are large: what a check of them reads, and what memory it takes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from diskwright.formats import qcow2
from diskwright.formats.qcow2.check.scan import pieces
from sansio.machine import Machine
from scale.images import COPIED, TIB, Layout, make

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
    return watched(*arguments)[0]


def watched(*arguments: str) -> tuple[int, str]:
    """The same, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *arguments],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    code, out, err, peak = json.loads(done.stdout)
    assert code == 0, (out, err)
    return int(peak), out


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
    """Of 64 KiB clusters: 10 GiB of tables, in a file that few file systems can hold."""
    for snapshots in (0, 3):
        layout = Layout(64 * TIB, snapshots=snapshots)
        image = room_for(layout, tmp_path) / f"diskwright-{os.getpid()}.qcow2"
        try:
            make(image, layout)
            begun = time.monotonic()
            peak, out = watched("check", "--output=json", str(image))
            told = json.loads(out)
            print(
                f"{snapshots} snapshots: {time.monotonic() - begun:.0f} s, {peak >> 10} MiB, "
                f"{told['passes']} passes, {told['bytes-read'] >> 20} MiB read"
            )
        finally:
            image.unlink(missing_ok=True)
        assert peak < MEMORY
        assert told["allocated-clusters"] == layout.data
        # Each table in the first pass and in the one that counts what it names; with snapshots
        # once more for the flags.  Some are on the border of two passes.
        tables = (2 + bool(snapshots)) * layout.tables + layout.blocks
        assert told["bytes-read"] < 1.1 * tables * layout.cluster


@pytest.mark.long
def test_a_full_disk_of_1_tib_is_repaired_in_bounded_memory(tmp_path: Path) -> None:
    """Leaks, counts that are too low, and entries that name the place of another, none and a
    table; then all of it is taken back."""
    layout = Layout(TIB)
    image, undo = make(tmp_path / "full.qcow2", layout), tmp_path / "undo"
    size = layout.cluster
    with image.open("r+b") as file:
        for block in range(0, layout.blocks, 7):
            for index, count in ((999, 5), (1999, 0)):
                file.seek(layout.blocks_at + block * size + 2 * index)
                file.write(count.to_bytes(2, "big"))
        for table in range(0, layout.tables, 97):
            first = layout.data_at + table * layout.per_table * size
            wrong = {51: first + 50 * size, 70: first + 70 * size + 512, 90: layout.length + size}
            wrong[91] = layout.tables_at + size * 5
            for index, entry in wrong.items():
                file.seek(layout.tables_at + table * size + 8 * index)
                file.write((entry | COPIED).to_bytes(8, "big"))
    damaged = tables_of(image, layout)
    assert run("check", "-r", "all", "--undo-file", str(undo), str(image)) < MEMORY
    assert run("check", str(image)) < MEMORY
    assert run("check", "--undo", str(undo), str(image)) < MEMORY
    assert image.stat().st_size == layout.length and tables_of(image, layout) == damaged


def tables_of(image: Path, layout: Layout) -> str:
    """A digest of all that is in front of the guest's data."""
    digest = hashlib.sha256()
    with image.open("rb") as file:
        for _ in range(layout.data_at >> 20):
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def room_for(layout: Layout, folder: Path) -> Path:
    """Where the image can be made; skips the test where that is nowhere."""
    tables = (layout.tables + layout.blocks) * layout.cluster
    reasons = []
    for place in (folder, Path("/dev/shm")):
        if not place.is_dir():
            continue
        free = shutil.disk_usage(place).free
        if place != folder:  # in memory, where other programs want some
            free = min(free, available_memory() - (4 << 30))
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.truncate(layout.length)
        except OSError as error:
            reasons.append(f"{place} holds no file of {layout.length} bytes ({error.strerror})")
            continue
        if free > tables:
            return place
        reasons.append(f"{place} has no room for {tables >> 30} GiB of tables")
    pytest.skip("; ".join(reasons) + ": give --basetemp a folder on XFS")


def available_memory() -> int:
    """Bytes."""
    with open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvail"))
