"""qcow2: grown, shrunk, and changed from one version to the other."""

from __future__ import annotations

from content import MIB
from guest import Guest, store
from shell import Shell, oracle, prove_disk, title

IMAGE = "amended.qcow2"


def amend(shell: Shell, disk: bytes) -> None:
    title("qcow2: grown and shrunk")
    shell(f"diskwright convert -f raw -O qcow2 disk.raw {IMAGE}")
    guest = Guest(disk)
    size = len(disk)
    shell(f"diskwright resize {IMAGE} +100M")
    guest.resize(size + 100 * MIB)
    guest.write(0x41, size + 50 * MIB, 20 * MIB)
    proved(shell, guest, "grown")
    shell(f"diskwright resize {IMAGE} {size - 40 * MIB}", expect=1)
    shell(f"diskwright resize --shrink {IMAGE} {size - 40 * MIB}")
    guest.resize(size - 40 * MIB)
    proved(shell, guest, "shrunk")
    shell(f"diskwright resize {IMAGE} {size}")
    guest.resize(size)
    proved(shell, guest, "grown again: what was cut off does not come back")

    title("qcow2: version and width of its counts, in place")
    for options, pattern in (
        ("lazy_refcounts=on", 0x42),
        ("refcount_bits=1", 0x43),
        ("refcount_bits=64", 0x44),
        ("refcount_bits=16,lazy_refcounts=off", 0x45),
        ("compat=v2", 0x46),
        ("compat=v3", 0x47),
    ):
        if options == "compat=v2":  # zero clusters, which version 2 has no word for
            guest.zero(100 * MIB, 5 * MIB)
            shell(f"diskwright io {guest.commands()} {IMAGE}", show=0)
        shell(f"diskwright amend -o {options} {IMAGE}")
        guest.write(pattern, pattern * MIB, 70_000)
        proved(shell, guest, f"with {options}")
    shell(f"diskwright info {IMAGE}", show=20)


def proved(shell: Shell, guest: Guest, what: str) -> None:
    shell(f"diskwright io {guest.commands()} {IMAGE}", show=0)
    prove_disk(shell.folder / IMAGE, guest.data, f"{IMAGE}, {what}")
    store(shell.folder / "model.raw", guest.data)
    oracle(shell, IMAGE, "model.raw")
