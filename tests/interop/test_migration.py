"""Scripts of people who move and back up machines: with qemu-img replaced by a link to ours."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from interop.tools import ROOT, TRUSTED

Peer = Callable[[str], str]
MIB = 1 << 20
SIZE = 4 * MIB

KINDS = {
    "raw": ("raw", ""),
    "qcow2": ("qcow2", ""),
    "dynamic": ("vhdx", "subformat=dynamic"),
    "fixed": ("vhdx", "subformat=fixed"),
    "sparse": ("vmdk", "subformat=monolithicSparse"),
    "flat": ("vmdk", "subformat=monolithicFlat"),
    "sparse2": ("vmdk", "subformat=twoGbMaxExtentSparse"),
    "flat2": ("vmdk", "subformat=twoGbMaxExtentFlat"),
    "stream": ("vmdk", "subformat=streamOptimized"),
}
WAYS = ("", "-p", "-S 0", "-S 64k", "-m 1 -W", "-t none -T none", "-p -m 16 -W", "-n", "-U", "-C")
# Numbers that depend on how the work is divided.
PARTLY = re.compile(r" *\((?!100\.00)\d+\.\d+/100%\)\r")


class Said(NamedTuple):
    status: int
    out: str
    err: str


class Pair:
    """The same script in two folders with the same files, by QEMU's programs and by ours."""

    def __init__(self, folder: Path, real: Path) -> None:
        self.theirs, self.ours = folder / "theirs" / "vm", folder / "ours" / "vm"
        links = folder / "links"
        for made in (self.theirs, self.ours, links):
            made.mkdir(parents=True)
        for name in ("qemu-img", "qemu-io"):
            (links / name).write_text(
                f"#!{sys.executable}\n"
                "import sys\n"
                "from diskwright.cli.main import main\n"
                "sys.exit(main(sys.argv[0], sys.argv[1:]))\n"
            )
            (links / name).chmod(0o755)
        self.path = {self.theirs: real.parent, self.ours: links}

    def run(self, folder: Path, script: str) -> Said:
        where = f"{self.path[folder]}:{TRUSTED['PATH']}"
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=folder,
            env={**TRUSTED, "PATH": where, "PYTHONPATH": str(ROOT / "src")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        text = (PARTLY.sub("", stream.decode()) for stream in (done.stdout, done.stderr))
        return Said(done.returncode, *text)

    def both(self, script: str) -> Said:
        """Run it on both sides; they must say the same."""
        theirs, ours = self.run(self.theirs, script), self.run(self.ours, script)
        assert ours == theirs
        return ours

    def reads(self, name: str, fmt: str, data: bytes) -> None:
        """The image that we made holds ``data`` for both, and QEMU finds nothing wrong in it."""
        for folder in (self.theirs, self.ours):
            there = self.ours / name
            done = self.run(folder, f"qemu-img convert -f {fmt} -O raw {there} back.raw")
            assert done == (0, "", "")
            assert (folder / "back.raw").read_bytes() == data
        if fmt != "raw":
            assert self.run(self.theirs, f"qemu-img check -q -f {fmt} {self.ours / name}")[0] == 0


def content() -> bytes:
    """Data of all lengths, runs of zeroes of all lengths."""
    rng = random.Random(7)
    disk = bytearray(SIZE)
    for _ in range(12):
        at = rng.randrange(SIZE >> 12) << 12
        data = rng.randbytes(min(4096 * rng.randrange(1, 20), SIZE - at))
        disk[at : at + len(data)] = data
    for _ in range(6):
        at = rng.randrange(SIZE >> 9) << 9
        disk[at : at + 512] = rng.randbytes(512)
    disk[MIB : MIB + MIB // 2] = bytes(MIB // 2)
    return bytes(disk)


@pytest.fixture(scope="module")
def data() -> bytes:
    return content()


@pytest.fixture
def pair(tmp_path: Path, peer: Peer, data: bytes) -> Pair:
    pair = Pair(tmp_path, Path(peer("qemu-img")))
    for folder in (pair.theirs, pair.ours):
        (folder / "disk.raw").write_bytes(data)
    return pair


def sources(pair: Pair, *kinds: str) -> None:
    """Images of the disk as QEMU writes them, on both sides."""
    for kind in kinds:
        fmt, options = KINDS[kind]
        words = f"-O {fmt}" + (f" -o {options}" if options else "")
        line = f"{pair.path[pair.theirs]}/qemu-img convert -f raw {words} disk.raw {kind}.img"
        for folder in (pair.theirs, pair.ours):
            assert pair.run(folder, line)[0] == 0


NAMES = list(KINDS)


@pytest.mark.parametrize("number", range(14))
def test_from_each_to_others(number: int, pair: Pair, data: bytes) -> None:
    source = NAMES[number % len(NAMES)]
    target = NAMES[(number + (1, 5)[number // len(NAMES)]) % len(NAMES)]
    way = WAYS[number % len(WAYS)]
    fmt, options = KINDS[target]
    sources(pair, source)
    if way == "-n":
        if target == "stream":
            way = ""  # ours are written in one pass, which makes a new file
        else:
            pair.both(f"qemu-img create -f {fmt} {f'-o {options}' if options else ''} out {SIZE}")
    told = f"-o {options}" if options and way != "-n" else ""
    words = f"{way} -f {KINDS[source][0]} -O {fmt} {told}"
    assert pair.both(f"qemu-img convert {words} {source}.img out").status == 0
    pair.reads("out", fmt, data)


SCRIPTS = {
    "are they equal": """
        qemu-img compare dynamic.img sparse.img
        qemu-img compare -f vmdk -F vhdx stream.img fixed.img
        qemu-img compare -p -q qcow2.img sparse2.img; echo $?
        qemu-io -f vhdx -c 'write -q -P 9 1M 4k' dynamic.img
        qemu-img compare dynamic.img sparse.img; echo $?
        qemu-img resize -q -f raw disk.raw 5M
        qemu-img compare -f raw disk.raw sparse.img; echo $?
        qemu-img compare -s -f raw disk.raw sparse.img; echo $?
    """,
    "to ESXi": """
        o=adapter_type=lsilogic,subformat=streamOptimized,compat6
        qemu-img convert -p -f qcow2 -O vmdk -o $o qcow2.img a.vmdk; echo $?
        tr -d '\\000' < a.vmdk | grep -a -e ^ddb -e ^createType | grep -v long
        qemu-img convert -O vmdk -o adapter_type=pvscsi,hwversion=14,subformat=monolithicFlat \\
            qcow2.img b.vmdk; echo $?; grep -v CID b.vmdk; ls
    """,
    "over a snapshot of VMware": """
        qemu-img create -q -f vmdk -b sparse.img -F vmdk one.vmdk
        qemu-io -c 'write -q -P 1 1M 64k' one.vmdk
        qemu-img create -q -f vmdk -b one.vmdk -F vmdk two.vmdk
        qemu-io -c 'write -q -P 2 2M 4k' two.vmdk
        qemu-img info --backing-chain two.vmdk | grep -e image: -e backing -e 'file format'
        qemu-img convert -O vhdx two.vmdk flat.vhdx
        qemu-img compare two.vmdk flat.vhdx
        qemu-img map --output=json two.vmdk
        qemu-img commit one.vmdk; echo $?
    """,
    "a backup each day": """
        qemu-img create -q -f qcow2 -b sparse.img -F vmdk mon
        qemu-io -c 'write -q -P 1 0 1M' mon
        qemu-img create -q -f qcow2 -b mon -F qcow2 tue
        qemu-io -c 'write -q -P 2 512k 1M' tue
        mkdir kept
        cp sparse.img kept
        qemu-img convert -O qcow2 -B sparse.img -F vmdk mon kept/mon
        qemu-img convert -O qcow2 -B mon -F qcow2 tue kept/tue
        cd kept
        qemu-img compare tue ../tue
        qemu-img rebase -b '' mon; qemu-img info mon | grep -c backing
        qemu-img compare tue ../tue
    """,
    "moved to another backing file": """
        qemu-img create -q -f qcow2 -b sparse.img -F vmdk over
        qemu-io -c 'write -q -P 1 1M 64k' over
        qemu-img rebase -b dynamic.img -F vhdx over; echo $?
        qemu-img compare over dynamic.img; echo $?
        qemu-img commit over; echo $?
        qemu-io -f vhdx -c 'read -P 1 1M 64k' dynamic.img | head -1
    """,
    "into what is there": """
        qemu-img create -q -f vmdk larger 5M
        qemu-img convert -n -O vmdk dynamic.img larger; echo $?
        qemu-img compare larger disk.raw
        qemu-img convert -n disk.raw two; echo $?
        qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentFlat f.vmdk 4M
        qemu-img convert -n -t none -W -m 4 -O vmdk stream.img f.vmdk
        qemu-img compare f.vmdk disk.raw
        qemu-img convert -O vmdk disk.raw dynamic.img fixed.img three
        qemu-img info three | grep virtual
    """,
    "names": """
        mkdir 'a b'
        qemu-img convert -O vmdk -o subformat=twoGbMaxExtentSparse disk.raw 'a b/c d.vmdk'
        qemu-img info 'a b/c d.vmdk' | grep -v -e cid -e 'disk size'
        qemu-img convert -O vmdk -o subformat=monolithicFlat disk.raw 'a b/ü.vmdk'
        qemu-img compare 'a b/ü.vmdk' disk.raw; ls 'a b'
        cp disk.raw a:b; qemu-img convert -O vhdx a:b x; echo $?
        qemu-img convert -f raw -O vhdx ./a:b x; echo $?
        qemu-img convert -O vhdx 'json:{"driver":"vmdk","file":{"driver":"file",
            "filename":"sparse.img"}}' y; qemu-img compare y disk.raw
        qemu-img convert --image-opts driver=vmdk,file.driver=file,file.filename=sparse2.img z
        cmp z disk.raw
        qemu-img convert -n --target-image-opts disk.raw driver=vhdx,file.filename=y; echo $?
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_print_the_same(name: str, pair: Pair) -> None:
    script = SCRIPTS[name]
    sources(pair, *(kind for kind in KINDS if f"{kind}.img" in script))
    pair.both(f"exec 2>&1\n{script}")
