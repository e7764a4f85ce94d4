"""qcow2: persistent dirty bitmaps, from `add` to a merge that outlives a conversion."""

from __future__ import annotations

import json
import shutil

from content import MIB
from guest import Guest, store
from shell import Shell, background, oracle, prove, prove_disk, title

IMAGE = "tracked.qcow2"
GRAIN = 65536


class Dirty:
    """Which grains of a disk must be dirty."""

    def __init__(self) -> None:
        self.grains: set[int] = set()

    def wrote(self, at: int, length: int) -> None:
        self.grains |= set(range(at // GRAIN, (at + length - 1) // GRAIN + 1))

    def ranges(self) -> list[tuple[int, int]]:
        """(offset, length) in bytes."""
        found: list[tuple[int, int]] = []
        for grain in sorted(self.grains):
            at = grain * GRAIN
            if found and sum(found[-1]) == at:
                found[-1] = (found[-1][0], found[-1][1] + GRAIN)
            else:
                found.append((at, GRAIN))
        return found


def track(shell: Shell, disk: bytes) -> None:
    title("qcow2: dirty bitmaps, which tell what a backup must copy")
    shell(f"diskwright convert -f raw -O qcow2 disk.raw {IMAGE}")
    guest = Guest(disk)
    monday, tuesday = Dirty(), Dirty()
    shell(f"diskwright bitmap --add -g 64k {IMAGE} monday")
    change(shell, guest, 0x31, 4, monday)
    shell(f"diskwright bitmap --add -g 64k --disable {IMAGE} empty")
    shell(f"diskwright bitmap --disable {IMAGE} monday")
    shell(f"diskwright bitmap --add -g 64k {IMAGE} tuesday")
    change(shell, guest, 0x32, 90, tuesday)
    shell(f"diskwright resize -q {IMAGE} +16M")
    guest.resize(len(disk) + 16 * MIB)
    change(shell, guest, 0x33, len(disk) // MIB - 4, tuesday)
    prove_bitmaps(shell, IMAGE, guest, monday=monday, tuesday=tuesday, empty=Dirty())

    title("qcow2: bitmaps merged, and taken along")
    shell(f"diskwright bitmap --merge monday --merge tuesday {IMAGE} empty")
    both = Dirty()
    both.grains = monday.grains | tuesday.grains
    shell(f"diskwright bitmap --remove {IMAGE} monday")
    shell(f"diskwright bitmap --clear {IMAGE} tuesday")
    prove_bitmaps(shell, IMAGE, guest, tuesday=Dirty(), empty=both)
    shell(f"diskwright convert --bitmaps -O qcow2 {IMAGE} moved.qcow2")
    prove_bitmaps(shell, "moved.qcow2", guest, tuesday=Dirty(), empty=both)


def change(shell: Shell, guest: Guest, pattern: int, mib: int, dirty: Dirty) -> None:
    """Writes, zeroes and a discard from ``mib`` MiB on, by `io`."""
    at = mib * MIB
    guest.write(pattern, at + 3000, 200_000)
    guest.zero(at + MIB, 128 * 1024)
    guest.discard(at + 2 * MIB, 192 * 1024)
    guest.write(pattern + 64, at + 5 * MIB, 4096)
    for offset, length in ((3000, 200_000), (MIB, 131072), (2 * MIB, 196608), (5 * MIB, 4096)):
        dirty.wrote(at + offset, length)
    shell(f"diskwright io {guest.commands()} {IMAGE}", show=0)


def prove_bitmaps(shell: Shell, image: str, guest: Guest, **wanted: Dirty) -> None:
    """Every bitmap bit by bit, by the Python API and by QEMU's NBD server; and the disk."""
    import diskwright

    with diskwright.open(shell.folder / image) as disk:
        names = {found.name for found in disk.bitmaps.list()}
        prove(names == set(wanted), f"the bitmaps of {image}", str(names))
        for name, dirty in wanted.items():
            found = disk.bitmaps.dirty(name)
            prove(found == dirty.ranges(), f"the bits of '{name}'", str(found[:5]))
    counts = ", ".join(f"{name}: {len(dirty.grains)} dirty" for name, dirty in wanted.items())
    print(f"  proved: {image}: {counts}")
    prove_disk(shell.folder / image, guest.data, image)
    store(shell.folder / "model.raw", guest.data)
    oracle(shell, image, "model.raw")
    if shutil.which("qemu-nbd") and shutil.which("nbdinfo"):
        name, dirty = max(wanted.items(), key=lambda item: len(item[1].grains))
        theirs(shell, image, name, dirty)


def theirs(shell: Shell, image: str, name: str, dirty: Dirty) -> None:
    socket = shell.folder / "bits.sock"
    with background(shell, f"qemu-nbd -r -t -f qcow2 -B {name} -k {socket} {image}", socket):
        uri = f"nbd+unix:///?socket={socket}"
        text = shell(f"nbdinfo --json --map=qemu:dirty-bitmap:{name} '{uri}'", show=0)
    found = [(p["offset"], p["length"]) for p in json.loads(text) if p["type"] & 1]
    prove(found == dirty.ranges(), f"'{name}' as qemu-nbd tells it", str(found[:5]))
