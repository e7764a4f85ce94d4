"""qcow2: extended L2 entries, an external data file, preallocation."""

from __future__ import annotations

import json

from content import MIB
from guest import Guest, store
from shell import Shell, oracle, prove, prove_disk, prove_file, title

KIB = 1024


def lay_out(shell: Shell, disk: bytes) -> None:
    extended(shell, disk)
    data_file(shell, disk)
    preallocated(shell)


def extended(shell: Shell, disk: bytes) -> None:
    title("qcow2: extended L2 entries, which allocate a 32nd of a cluster")
    over = "-b disk.raw -F raw"
    for name, options in (("whole", "cluster_size=2M"), ("sub", "cluster_size=2M,extended_l2=on")):
        shell(f"diskwright create -q -f qcow2 {over} -o {options} {name}.qcow2")
        guest = Guest(disk)
        for at in range(8, 120, 4):
            guest.write(at, at * MIB + 20 * KIB, 4 * KIB)
        guest.zero(130 * MIB + 64 * KIB, 128 * KIB)
        guest.discard(140 * MIB + 128 * KIB, 256 * KIB)
        shell(f"diskwright io --policy trusted {guest.commands()} {name}.qcow2", show=0)
        prove_disk(shell.folder / f"{name}.qcow2", guest.data, f"{name}.qcow2 over disk.raw")
        store(shell.folder / "model.raw", guest.data)
        oracle(shell, f"{name}.qcow2", "model.raw")
    whole, sub = (held(shell, f"{name}.qcow2") for name in ("whole", "sub"))
    prove(sub < whole // 4, "subclusters take less space", f"{sub} and {whole}")
    print(f"  28 writes of 4 KiB took {whole // KIB} KiB by clusters, {sub // KIB} by subclusters")


def held(shell: Shell, image: str) -> int:
    """Bytes of the disk that an overlay holds itself."""
    line = f"diskwright map --policy trusted --output=json {image}"
    return sum(p["length"] for p in json.loads(shell(line, show=0)) if p["depth"] == 0)


def data_file(shell: Shell, disk: bytes) -> None:
    title("qcow2: guest data in a file of their own, which stays a raw disk")
    options = "data_file=guest.raw,data_file_raw=on"
    shell(f"diskwright convert -f raw -O qcow2 -o {options} disk.raw tables.qcow2")
    print("  A data file is named by the image, so it is not opened by those who trust none:")
    shell('diskwright io --policy untrusted -r -c "read 0 512" tables.qcow2', expect=1)
    guest = Guest(disk)
    guest.write(0x41, 5 * MIB + 17, 70_000)
    guest.zero(50 * MIB, 2 * MIB, unmap=True)
    guest.discard(60 * MIB, MIB)
    shell(f"diskwright io --policy trusted {guest.commands()} tables.qcow2", show=0)
    shell("diskwright check --policy trusted tables.qcow2")
    prove_disk(shell.folder / "tables.qcow2", guest.data, "tables.qcow2")
    prove_file(shell.folder / "guest.raw", guest.data, "guest.raw, read as a raw disk")
    oracle(shell, "tables.qcow2", "guest.raw")


def preallocated(shell: Shell) -> None:
    title("qcow2: space taken beforehand")
    size = 48 * MIB
    for mode in ("off", "metadata", "falloc", "full"):
        image = f"{mode}.qcow2"
        shell(f"diskwright create -q -f qcow2 -o preallocation={mode} {image} {size}")
        path = shell.folder / image
        blocks = path.stat().st_blocks * 512
        print(f"  {path.stat().st_size // KIB} KiB long, {blocks // KIB} KiB of it in use")
        wanted = {"off": path.stat().st_size < MIB, "metadata": blocks < MIB < size // 2}
        prove(wanted.get(mode, blocks >= size), f"the space that {mode} takes", str(blocks))
        guest = Guest(bytes(size))
        guest.write(0x51, 7 * MIB, 300_000)
        shell(f"diskwright io {guest.commands()} {image}", show=0)
        shell(f"diskwright resize -q --preallocation={mode} {image} +16M")
        guest.resize(size + 16 * MIB)
        guest.write(0x52, size + MIB, MIB)
        shell(f"diskwright io {guest.commands()} {image}", show=0)
        prove_disk(path, guest.data, image)
        store(shell.folder / "model.raw", guest.data)
        oracle(shell, image, "model.raw")
