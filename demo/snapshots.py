"""qcow2: internal snapshots, taken, read, applied, deleted."""

from __future__ import annotations

from content import MIB
from guest import Guest, Kept, store
from shell import Shell, has_qemu, oracle, prove, prove_disk, prove_file, title

IMAGE = "snaps.qcow2"


def snapshot(shell: Shell, disk: bytes) -> None:
    title("qcow2: snapshots inside the image")
    shell(f"diskwright convert -f raw -O qcow2 disk.raw {IMAGE}")
    guest = Guest(disk)
    held: dict[str, Kept] = {}
    for number, name in enumerate(("fresh", "installed", "running")):
        shell(f"diskwright snapshot -c {name} {IMAGE}")
        held[name] = Kept(shell.folder / f"{name}.model", guest.data)
        guest.write(0x70 + number, (5 + 20 * number) * MIB + 77, 3 * MIB)
        guest.zero((12 + 20 * number) * MIB, 2 * MIB, unmap=True)
        shell(f"diskwright io {guest.commands()} {IMAGE}", show=0)
    shell(f"diskwright resize -q {IMAGE} +32M")
    guest.resize(len(disk) + 32 * MIB)
    guest.write(0x79, len(disk) + 5 * MIB, MIB)
    shell(f"diskwright io {guest.commands()} {IMAGE}", show=0)
    with_vm_state(shell, held, guest)
    shell(f"diskwright snapshot -l {IMAGE}")
    prove_all(shell, guest, held)

    title("qcow2: a snapshot read, applied and deleted")
    shell(f"diskwright convert -l installed -O raw {IMAGE} installed.raw")
    prove_file(shell.folder / "installed.raw", held["installed"], "installed.raw")
    shell(f"diskwright snapshot -a fresh {IMAGE}")
    guest = Guest(held["fresh"][:])
    guest.write(0x7A, 90 * MIB, 2 * MIB)
    shell(f"diskwright io {guest.commands()} {IMAGE}", show=0)
    prove_all(shell, guest, held)
    for name in ("installed", "fresh"):
        shell(f"diskwright snapshot -d {name} {IMAGE}")
        del held[name]
    prove_all(shell, guest, held)
    shell("diskwright check snaps.qcow2")


def with_vm_state(shell: Shell, held: dict[str, Kept], guest: Guest) -> None:
    """A snapshot that holds the state of a machine as well, by the Python API."""
    import diskwright

    state = bytes(range(256)) * 2000
    with diskwright.open(shell.folder / IMAGE, writable=True) as disk:
        disk.snapshots.write_vm_state(0, state)
        disk.snapshots.create("with memory", vm_state_size=len(state))
    held["with memory"] = Kept(shell.folder / "memory.model", guest.data)
    with diskwright.open(shell.folder / IMAGE) as disk:
        disk.snapshots.show("with memory")
        prove(disk.snapshots.read_vm_state(0, len(state)) == state, "the state of the machine")
    print(f"  proved: {len(state)} bytes of a machine's state are in the snapshot 'with memory'")


def prove_all(shell: Shell, guest: Guest, held: dict[str, Kept]) -> None:
    """The disk and every snapshot, each against its own model."""
    prove_disk(shell.folder / IMAGE, guest.data, IMAGE)
    for name, data in held.items():
        prove_disk(shell.folder / IMAGE, data, f"{IMAGE}, snapshot '{name}'", snapshot=name)
    store(shell.folder / "model.raw", guest.data)
    oracle(shell, IMAGE, "model.raw")
    if has_qemu():
        name = next(iter(held))
        shell(f"qemu-img convert -l 'snapshot.name={name}' -O raw {IMAGE} theirs.raw")
        what = f"snapshot '{name}' as qemu-img reads it"
        prove_file(shell.folder / "theirs.raw", held[name], what, longer=True)
