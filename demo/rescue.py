"""qcow2: damaged, repaired, the repair taken back; and an image whose header is gone."""

from __future__ import annotations

import json
from pathlib import Path

from content import MIB
from guest import store
from shell import Shell, has_qemu, oracle, prove, prove_disk, prove_file, title

IMAGE = "broken.qcow2"
CLUSTER = 65536


def rescue(shell: Shell, disk: bytes) -> None:
    title("qcow2: damaged in six places")
    shell(f"diskwright convert -f raw -O qcow2 disk.raw {IMAGE}")
    path = shell.folder / IMAGE
    model = damage(path, disk)
    broken = path.read_bytes()
    shell(f"diskwright check {IMAGE}", expect=2, show=6)
    prove_disk(path, model, "what can be read of it")

    title("qcow2: the repair shown, done with an undo file, and taken back")
    shell(f"diskwright check -r all --dry-run {IMAGE}", expect=2)
    prove(path.read_bytes() == broken, "looking at a repair changes nothing")
    shell(f"diskwright check -q -r all --undo-file broken.undo {IMAGE}")
    prove_disk(path, model, "the repaired image")
    prove(path.read_bytes() != broken, "the image was repaired")
    shell(f"diskwright check --undo broken.undo {IMAGE}")
    prove(path.read_bytes() == broken, "the repair was taken back to the byte")
    print("  proved: every byte is as it was before the repair")

    title("qcow2: repaired for good")
    shell(f"diskwright check -r all {IMAGE}", show=4)
    prove_disk(path, model, "the repaired image")
    found = json.loads(shell(f"diskwright check --output=json {IMAGE}", show=0))
    prove(not found.get("leaks") and not found.get("corruptions"), "our check finds nothing")
    store(shell.folder / "model.raw", model)
    oracle(shell, IMAGE, "model.raw")
    if has_qemu():
        found = json.loads(shell(f"qemu-img check --output=json {IMAGE}", show=0))
        wrong = {k: v for k, v in found.items() if k in ("leaks", "corruptions", "check-errors")}
        prove(not any(wrong.values()), "qemu-img finds nothing", str(wrong))
    guard(shell, disk)
    salvage(shell, disk)


def guard(shell: Shell, disk: bytes) -> None:
    title("qcow2: a damaged entry that points at a table, met by a write")
    shell("diskwright convert -f raw -O qcow2 disk.raw guarded.qcow2")
    path = shell.folder / "guarded.qcow2"
    file = bytearray(path.read_bytes())
    l1 = number(file, 40)
    entry = (number(file, l1) & (1 << 56) - 512) + 8 * 40
    file[entry : entry + 8] = (l1 | 1 << 63).to_bytes(8, "big")
    path.write_bytes(file)
    shell(f'diskwright io -c "write -P 9 {40 * CLUSTER} 64k" guarded.qcow2', expect=1)
    prove(path.read_bytes()[l1 : l1 + CLUSTER] == file[l1 : l1 + CLUSTER], "the table is as it was")
    for tool in ["diskwright", *(["qemu-img"] if has_qemu() else [])]:
        told = json.loads(shell(f"{tool} info --output=json guarded.qcow2", show=0))
        prove(told["format-specific"]["data"]["corrupt"], f"{tool} tells that it is marked corrupt")
    print("  the write was refused, and the image is marked corrupt: nobody writes to it until")
    shell("diskwright check -q -r all guarded.qcow2")
    shell(f'diskwright io -c "write -P 9 {40 * CLUSTER} 64k" guarded.qcow2', show=1)
    model = bytearray(disk)
    model[40 * CLUSTER : 41 * CLUSTER] = b"\x09" * CLUSTER
    prove_disk(path, model, "the repaired image, written to")
    store(shell.folder / "model.raw", model)
    oracle(shell, "guarded.qcow2", "model.raw")


def number(file: bytes | bytearray, at: int) -> int:
    return int.from_bytes(file[at : at + 8], "big")


def damage(path: Path, disk: bytes) -> bytes:
    """Break the tables of an image as `convert` makes it; what its disk reads as then."""
    file = bytearray(path.read_bytes())
    l1, reftable = number(file, 40), number(file, 48)
    place = (1 << 56) - 512
    l2 = number(file, l1) & place
    block = number(file, reftable) & place

    def put(at: int, value: int) -> None:
        file[at : at + 8] = value.to_bytes(8, "big")

    entries = [i for i in range(4096) if number(file, l2 + 8 * i) & place]
    entries = [i for i in entries if i * CLUSTER < len(disk)]
    print("  the counts of 1000 clusters become 0, and those of 30 free ones 1;")
    used = len(file) // CLUSTER
    file[block : block + 2 * min(1000, used)] = bytes(2 * min(1000, used))
    for cluster in range(used, used + 30):
        file[block + 2 * cluster + 1] = 1
    file += bytes(30 * CLUSTER)
    print("  the L1 entry gets reserved bits; an entry of L2 loses COPIED, one gets reserved bits;")
    put(l1, number(file, l1) | 6)
    put(l2 + 8 * entries[5], number(file, l2 + 8 * entries[5]) & ~(1 << 63))
    put(l2 + 8 * entries[9], number(file, l2 + 8 * entries[9]) | 1 << 60)
    print("  and two guest clusters have one host cluster.")
    first, second = entries[20], entries[30]
    put(l2 + 8 * second, number(file, l2 + 8 * first))
    path.write_bytes(file)
    model = bytearray(disk)
    at = first * CLUSTER
    model[second * CLUSTER : (second + 1) * CLUSTER] = model[at : at + CLUSTER]
    return bytes(model)


def salvage(shell: Shell, disk: bytes) -> None:
    title("qcow2: an image that has lost its header")
    shell("diskwright convert -f raw -O qcow2 disk.raw headless.qcow2")
    path = shell.folder / "headless.qcow2"
    with path.open("r+b") as file:
        file.write(bytes(CLUSTER))
    lost = path.read_bytes()
    shell("diskwright check -f qcow2 headless.qcow2", expect=1)
    line = "diskwright salvage -f qcow2 -O raw --map lost.map headless.qcow2 found.raw"
    shell(line, expect=3)
    prove_file(shell.folder / "found.raw", disk, "found.raw, though nothing says where it was")
    prove(path.read_bytes() == lost, "salvage does not write to its source")
    said = (shell.folder / "lost.map").read_text().splitlines()
    guessed = sum(int(w[1], 0) for w in map(str.split, said[-200:]) if len(w) == 3 and w[2] == "?")
    print(f"  the map calls {guessed // MIB} of {len(disk) // MIB} MiB guessed:")
    for row in said[:4]:
        print(f"    {row}")
