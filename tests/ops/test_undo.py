"""Repairs that are rehearsed: what they would write, and taking them back to the byte."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diskwright
from cli.support import ours
from diskwright.engine.kernel import Driver
from diskwright.errors import ImageError, UsageError
from diskwright.filters import rehearsal as rh
from diskwright.filters.patches import KEPT, ZEROES, Patches
from diskwright.filters.rehearsal import Rehearsal
from diskwright.ops.calls.given import spec_of
from diskwright.ops.check import check
from sansio.damages import DAMAGES, Damage, Image

ROOT = Path(__file__).resolve().parents[2]

ROWS = pytest.mark.parametrize("row", DAMAGES[::5], ids=lambda row: row.name)
SOME = pytest.mark.parametrize("row", DAMAGES[1::19], ids=lambda row: row.name)


def put(path: Path, row: Damage) -> bytes:
    data: bytes = row.image()
    path.write_bytes(data)
    return data


@ROWS
def test_undone_to_the_byte(tmp_path: Path, row: Damage) -> None:
    """A rehearsed repair ends as a plain one does; undoing gives every byte and the length back."""
    before = put(tmp_path / "a", row)
    put(tmp_path / "b", row)
    plain = diskwright.check(tmp_path / "b", format="qcow2", repair="all")
    planned = diskwright.plan_repair(tmp_path / "a", format="qcow2")
    assert (tmp_path / "a").read_bytes() == before
    done = diskwright.check(tmp_path / "a", format="qcow2", repair="all", undo_file=tmp_path / "u")
    assert done == plain._replace(filename=done.filename)
    after = (tmp_path / "a").read_bytes()
    assert after == (tmp_path / "b").read_bytes()
    assert planned.plan is not None and planned.after is not None
    assert bool(planned.plan.writes) == (after != before) == (tmp_path / "u").exists()
    assert planned.after.corruptions == plain.corruptions
    if after == before:
        return
    for change in planned.plan.changes:
        assert change.file == str(tmp_path / "a")
    undone = diskwright.undo(tmp_path / "a", tmp_path / "u")
    assert undone.places or undone.lengths
    assert (tmp_path / "a").read_bytes() == before
    again = diskwright.undo(tmp_path / "a", tmp_path / "u")
    assert again[:3] == (0, 0, 0)


class Killed(Exception):
    pass


async def _stopped(self: Rehearsal, stop: int, rng: random.Random) -> None:
    """What a loss of power may leave after ``stop`` entries: all up to the last barrier, and any
    sectors of what came later."""
    entries = list(self.entries())[:stop]
    safe = max((i for i, e in enumerate(entries) if e.kind == rh.FLUSH), default=0)
    for index, entry in enumerate(entries):
        leaf = self.files[entry.file].leaf
        if entry.kind == rh.WRITE:
            data = self.kept(entry.place, entry.length)
            at = 0
            while at < len(data):
                end = min(len(data), at + 512 - (entry.offset + at) % 512)
                if index <= safe or rng.random() < 0.5:
                    await leaf.write([entry.offset + at], [data[at:end]])
                at = end
        elif index > safe and rng.random() < 0.5:
            continue
        elif entry.kind == rh.ZERO:
            await leaf.zero([entry.offset], [entry.length])
        elif entry.kind == rh.LENGTH:
            await leaf.truncate(entry.offset)
    raise Killed


@SOME
def test_killed_anywhere(tmp_path: Path, row: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose repair lost power at any moment is recognised, and taken back; so is one whose
    undoing did."""
    rng = random.Random(row.name)
    image, kept = tmp_path / "a", tmp_path / "u"
    before = put(image, row)
    count = 0

    async def counted(self: Rehearsal) -> None:
        nonlocal count
        count = len(self)

    monkeypatch.setattr(Rehearsal, "carry_out", counted)
    diskwright.check(image, format="qcow2", repair="all", undo_file=kept)
    kept.unlink(missing_ok=True)
    for stop in sorted(rng.sample(range(count + 1), min(count + 1, 8))):
        image.write_bytes(before)

        async def stopped(self: Rehearsal, stop: int = stop) -> None:
            await _stopped(self, stop, rng)

        monkeypatch.setattr(Rehearsal, "carry_out", stopped)
        with pytest.raises(Killed):
            diskwright.check(image, format="qcow2", repair="all", undo_file=kept)
        # Undoing is stopped, too, at each of its writes.
        with monkeypatch.context() as patch:
            for left in (0, 1, 2):
                _limit(patch, left)
                try:
                    diskwright.undo(image, kept)
                except Killed:
                    pass
        diskwright.undo(image, kept)
        assert image.read_bytes() == before, stop
        kept.unlink()


def _limit(patch: pytest.MonkeyPatch, left: int) -> None:
    """The file node fails after so many changes."""
    from diskwright.protocols.filenode import FileNode

    for name in ("write", "zero", "truncate"):
        real = getattr(FileNode, name)
        while hasattr(real, "real"):
            real = real.real

        async def limited(self: FileNode, *words: object, real: object = real) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            await real(self, *words)  # type: ignore[operator]

        limited.real = real  # type: ignore[attr-defined]
        patch.setattr(FileNode, name, limited)


@pytest.fixture
def repaired(tmp_path: Path) -> Iterator[tuple[Path, Path, bytes]]:
    row = next(row for row in DAMAGES if row.name == "data-shared")
    before = put(tmp_path / "a", row)
    diskwright.check(tmp_path / "a", format="qcow2", repair="all", undo_file=tmp_path / "u")
    yield tmp_path / "a", tmp_path / "u", before


def test_refused_when_written_to_since(repaired: tuple[Path, Path, bytes]) -> None:
    """Any byte that differs outside what a repair may leave is somebody else's."""
    image, kept, before = repaired
    after = image.read_bytes()
    rng = random.Random(3)
    for _ in range(40):
        data = bytearray(after)
        at = rng.randrange(len(data))
        data[at] ^= rng.randrange(1, 256)
        image.write_bytes(data)
        with pytest.raises(ImageError, match="was changed by others"):
            diskwright.undo(image, kept)
        assert image.read_bytes() == data
    for other in (before[:-1024], after + bytes(512)):
        image.write_bytes(other)
        with pytest.raises(ImageError, match=r"its length|left alone|sector"):
            diskwright.undo(image, kept)
        assert image.read_bytes() == other


def test_refused_after_a_guest_wrote(repaired: tuple[Path, Path, bytes]) -> None:
    image, kept, _ = repaired
    with diskwright.open(image, format="qcow2", writable=True) as disk:
        disk.write_at(4096, b"later")
    with pytest.raises(ImageError, match="was changed by others"):
        diskwright.undo(image, kept)


def test_a_damaged_undo_file(repaired: tuple[Path, Path, bytes]) -> None:
    """Cut off or changed anywhere, it is refused before anything is written."""
    image, kept, _ = repaired
    after, good = image.read_bytes(), kept.read_bytes()
    rng = random.Random(5)
    for _ in range(25):
        bad = bytearray(good)
        if rng.random() < 0.3:
            del bad[rng.randrange(len(bad)) :]
        else:
            bad[rng.randrange(len(bad))] ^= rng.randrange(1, 256)
        kept.write_bytes(bad)
        with pytest.raises((ImageError, UsageError)):
            diskwright.undo(image, kept)
        assert image.read_bytes() == after


def test_a_hostile_undo_file(repaired: tuple[Path, Path, bytes]) -> None:
    """With its digest made right again: a clear error, or an image that was not written to outside
    of its length."""
    import hashlib

    image, kept, before = repaired
    after, good = image.read_bytes(), kept.read_bytes()[:-32]
    rng = random.Random(7)
    for _ in range(40):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = (
                rng.randrange(8, min(len(bad), 160))
                if rng.random() < 0.7
                else rng.randrange(8, len(bad))
            )
            bad[at] = rng.choice((0, 255, 128, 1, rng.randrange(256)))
        kept.write_bytes(bytes(bad) + hashlib.sha256(bad).digest())
        image.write_bytes(after)
        try:
            diskwright.undo(image, kept)
        except (ImageError, UsageError, diskwright.errors.DiskError):
            assert image.read_bytes() == after
        assert image.stat().st_size <= max(len(after), len(before))
        assert sorted(p.name for p in image.parent.iterdir()) == ["a", "u"]


def test_options_that_contradict(tmp_path: Path) -> None:
    put(tmp_path / "a", DAMAGES[0])
    put(tmp_path / "taken", DAMAGES[0])
    for words, text in (
        (["--dry-run"], "need --repair"),
        (["--undo-file", "u"], "need --repair"),
        (["-r", "all", "--dry-run", "--undo-file", "u"], "changes nothing"),
        (["--undo", "u", "-r", "all"], "excludes"),
        (["-r", "all", "--undo-file", "taken"], "exists already; --force"),
        (["--undo", "missing"], "No such file"),
        (["--undo", "taken"], "is no undo file"),
    ):
        done = ours("check", *words, "a", cwd=tmp_path)
        assert done.status == 1 and text in done.err.decode(), (words, done.err)
    assert not (tmp_path / "u").exists()


def test_the_command(tmp_path: Path) -> None:
    row = next(row for row in DAMAGES if row.name == "leaked-clusters")
    before = put(tmp_path / "a", row)
    (tmp_path / "a").chmod(0o444)
    done = ours("check", "-r", "all", "--dry-run", "a", cwd=tmp_path)
    assert done.status == 3
    text = done.out.decode()
    assert "would be repaired" in text and "a: 512 bytes at 0x" in text
    assert "reference counts" in text and "Nothing was written" in text
    assert "Repairing cluster" in done.err.decode()
    done = ours("check", "-r", "all", "--dry-run", "--output=json", "a", cwd=tmp_path)
    told = json.loads(done.out)
    assert told["dry-run"] is True and told["leaks"] and "leaks-fixed" not in told
    assert told["after"] == {"corruptions": 0, "leaks": 0, "check-errors": 0}
    assert told["planned"][0]["action"] == "write" and told["planned-writes"] >= 1
    assert (tmp_path / "a").read_bytes() == before
    (tmp_path / "a").chmod(0o644)
    done = ours("check", "-r", "all", "--undo-file", "u", "a", cwd=tmp_path)
    assert done.status == 0
    assert (tmp_path / "a").read_bytes() != before
    done = ours("check", "--undo", "u", "a", cwd=tmp_path)
    assert done.status == 0 and b"undone" in done.out
    assert (tmp_path / "a").read_bytes() == before
    done = ours("check", "--undo", "u", "a", cwd=tmp_path)
    assert done.status == 0 and b"already" in done.out


def test_nothing_to_repair(tmp_path: Path) -> None:
    diskwright.create(tmp_path / "a", format="qcow2", size=1 << 20)
    done = ours("check", "-r", "all", "--undo-file", "u", "a", cwd=tmp_path)
    assert done.status == 0 and b"'u' was not written" in done.out
    assert not (tmp_path / "u").exists()
    done = ours("check", "-r", "all", "--dry-run", "a", cwd=tmp_path)
    assert done.status == 0 and b"Nothing is to be done" in done.out


def test_patches() -> None:
    """Against bytes."""
    rng = random.Random(11)
    patches, model = Patches(), [KEPT] * 400
    store = 0
    for _ in range(3000):
        start = rng.randrange(400)
        end = rng.randrange(start + 1, 401)
        if rng.random() < 0.1:
            patches.cut(start)
            model[start:] = [KEPT] * (400 - start)
        elif rng.random() < 0.3:
            patches.put(start, end, ZEROES)
            model[start:end] = [ZEROES] * (end - start)
        else:
            patches.put(start, end, store)
            model[start:end] = range(store, store + end - start)
            store += end - start
        first = rng.randrange(400)
        last = rng.randrange(first + 1, 401)
        found: list[int] = []
        for a, b, place in patches.parts(first, last):
            found += [place] * (b - a) if place < 0 else range(place, place + b - a)
        assert found == model[first:last]


def test_large_and_sparse(tmp_path: Path) -> None:
    """A long image costs what is in it: 8 TiB with a leak."""
    path = tmp_path / "a"
    diskwright.create(path, format="qcow2", size=1 << 43)
    with diskwright.open(path, format="qcow2", writable=True) as disk:
        disk.write_at(0, b"x")
    with path.open("r+b") as file:
        file.truncate(1 << 43)
        file.seek((2 << 16) + 2 * 100)  # the count of cluster 100
        file.write(b"\0\1")
        file.seek(0)
        before = file.read(1 << 20)
    done = diskwright.check(path, repair="all", undo_file=tmp_path / "u")
    assert done.leaks_fixed and not done.leaks
    diskwright.undo(path, tmp_path / "u")
    with path.open("rb") as file:
        assert file.read(1 << 20) == before
    assert path.stat().st_size == 1 << 43


def test_vhdx(tmp_path: Path) -> None:
    """A file that is cut off gets its tail back, a log that was replayed its entries."""
    path = tmp_path / "a"
    diskwright.create(path, format="vhdx", size=1 << 30)
    with diskwright.open(path, format="vhdx", writable=True) as disk:
        disk.write_at(0, b"x" * 5000)
        disk.write_at(1 << 28, b"y" * 5000)
    with path.open("ab") as file:
        file.write(random.Random(1).randbytes(3 << 20) + bytes(5 << 20))
    before = path.read_bytes()
    plan = diskwright.plan_repair(path, repair="leaks").plan
    assert plan is not None and any(change.action == "resize" for change in plan.changes)
    assert path.read_bytes() == before
    diskwright.check(path, repair="leaks", undo_file=tmp_path / "u")
    assert path.stat().st_size < len(before)
    diskwright.undo(path, tmp_path / "u")
    assert path.read_bytes() == before


def test_vmdk_in_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    path = folder / "a.vmdk"
    diskwright.create(
        path, format="vmdk", size=5 << 30, options={"subformat": "twoGbMaxExtentSparse"}
    )
    with diskwright.open(path, format="vmdk", writable=True, policy="trusted") as disk:
        for at in (0, 3 << 30, 9 << 29):
            disk.write_at(at, b"x" * 100_000)
    extents = sorted(folder.glob("a-s*.vmdk"))
    assert len(extents) == 3
    for extent in extents[:2]:
        with extent.open("r+b") as file:
            head = file.read(512)
            (place,) = struct.unpack_from("<Q", head, 48)  # the redundant directory
            file.seek(place * 512)
            (table,) = struct.unpack("<I", file.read(4))
            file.seek(table * 512)
            file.write(b"\1")
    files = sorted(folder.iterdir())
    before = [file.read_bytes() for file in files]
    found = diskwright.plan_repair(path, policy="trusted")
    assert found.plan is not None
    assert {Path(change.file).name for change in found.plan.changes} >= {
        e.name for e in extents[:2]
    }
    assert [file.read_bytes() for file in files] == before
    diskwright.check(path, policy="trusted", repair="all", undo_file=tmp_path / "u")
    assert [file.read_bytes() for file in files] != before
    # Elsewhere, and by a path that has nothing to do with where it was.
    moved = tmp_path / "moved"
    folder.rename(moved)
    diskwright.undo(moved / "a.vmdk", tmp_path / "u")
    assert [file.read_bytes() for file in sorted(moved.iterdir())] == before


def test_killed_process(tmp_path: Path) -> None:
    """The undo file is there, whole, before the image changes: a process that dies at its first
    write leaves both."""
    row = next(row for row in DAMAGES if row.name == "data-shared")
    before = put(tmp_path / "a", row)
    script = (
        "import os, diskwright\n"
        "from diskwright.filters.rehearsal import Rehearsal\n"
        "real = Rehearsal.carry_out\n"
        "async def half(self):\n"
        "    leaf = self.files[0].leaf\n"
        "    n = 0\n"
        "    write = leaf.write\n"
        "    async def counted(*words):\n"
        "        nonlocal n\n"
        "        n += 1\n"
        "        if n == 3: os._exit(9)\n"
        "        await write(*words)\n"
        "    leaf.write = counted\n"
        "    await real(self)\n"
        "Rehearsal.carry_out = half\n"
        "diskwright.check('a', repair='all', undo_file='u')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=False)
    assert done.returncode == 9
    assert (tmp_path / "a").read_bytes() != before
    diskwright.undo(tmp_path / "a", tmp_path / "u")
    assert (tmp_path / "a").read_bytes() == before


def test_a_read_error_changes_nothing(tmp_path: Path) -> None:
    """A repair that cannot read what it needs has not begun."""
    row = next(row for row in DAMAGES if row.name == "data-shared")
    before = put(tmp_path / "a", row)
    sector = Image(before).host(20) // 512
    source = {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(tmp_path / "a")},
            "inject-error": [{"event": "none", "iotype": "read", "errno": 5, "sector": sector}],
        },
    }
    driver = Driver()
    try:
        work = check(driver, spec_of(source), repair="all", undo_file=str(tmp_path / "u"))
        with pytest.raises(OSError, match="Input/output"):
            driver.run(work)
    finally:
        driver.close()
    assert not (tmp_path / "u").exists()
    assert (tmp_path / "a").read_bytes() == before
