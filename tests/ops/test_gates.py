"""Where paths of other machines are: from the command line, the environment, and Python."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import diskwright
from cli.support import ours
from diskwright import aio
from diskwright.errors import DiskError, Refused, UsageError
from diskwright.ops.gates import Policy, from_environment, gate_of, pairs


def test_pairs() -> None:
    assert pairs(["C:\\VMs=/srv/a=b", "D:/=/d"], "x") == {"C:\\VMs": "/srv/a=b", "D:/": "/d"}
    for word in ("C:\\VMs", "=/srv", "C:\\VMs="):
        with pytest.raises(UsageError, match="x expects FROM=TO"):
            pairs([word], "x")


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISKWRIGHT_MAP_PATH", raising=False)
    assert from_environment() == {}
    monkeypatch.setenv("DISKWRIGHT_MAP_PATH", "C:\\=/c;D:\\x=/with;;semicolon;")
    assert from_environment() == {"C:\\": "/c", "D:\\x": "/with;semicolon"}
    gate = gate_of(Policy(map_paths={"C:\\": "/other"}))
    assert gate.paths == {"C:\\": "/other", "D:\\x": "/with;semicolon"}
    monkeypatch.setenv("DISKWRIGHT_MAP_PATH", "C:\\")
    with pytest.raises(UsageError, match="DISKWRIGHT_MAP_PATH expects FROM=TO"):
        gate_of()


def test_an_unreadable_configuration_file_stops_and_tells_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISKWRIGHT_CONFIG", str(tmp_path))  # a folder
    with pytest.raises(UsageError, match=r"read: [^\[/]* \(DISKWRIGHT_CONFIG names another one"):
        gate_of()


def test_on_the_command_line(tmp_path: Path) -> None:
    assert ours("create", "-f", "raw", "a", "1M", cwd=tmp_path).status == 0
    words = ("info", "-f", "raw", "--map-path", "C:\\=/c", "--map-path=D:\\=/d", "a")
    assert ours(*words, cwd=tmp_path).status == 0
    done = ours("info", "-f", "raw", "--map-path", "nothing", "a", cwd=tmp_path)
    assert (done.status, done.err) == (1, b"qemu-img: --map-path expects FROM=TO, not 'nothing'\n")


def test_from_python(tmp_path: Path) -> None:
    base, child = tmp_path / "vms" / "base", tmp_path / "child"
    base.parent.mkdir()
    diskwright.create(base, format="vmdk", size=1 << 20)
    with diskwright.open(base, writable=True) as disk:
        disk.write_at(0, b"base")
    options = {"backing_file": str(base), "backing_fmt": "vmdk"}
    diskwright.create(child, format="vmdk", options=options)
    paths = {"C:\\VMs": str(base.parent)}
    policy = Policy("trusted", map_paths=paths)
    diskwright.rebase(child, "C:\\VMs\\base", backing_format="vmdk", unsafe=True)
    with pytest.raises(DiskError, match="--map-path"):
        diskwright.open(child, policy="trusted")
    with pytest.raises(Refused):
        diskwright.open(child, policy=Policy("untrusted", map_paths=paths))
    with diskwright.open(child, policy=policy) as disk:
        assert disk.read_at(0, 4) == b"base"
    assert len(diskwright.info_chain(child, policy=policy)) == 2

    async def read() -> bytes:
        async with aio.open(child, policy=policy) as disk:
            return await disk.read_at(0, 4)

    assert asyncio.run(read()) == b"base"
