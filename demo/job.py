"""The main job: make a disk, convert, overlay, write, compare, commit."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time

from content import MIB, SECTOR, make_disk
from shell import (
    Shell,
    first_difference,
    has_qemu,
    oracle,
    prove,
    prove_disk,
    prove_file,
    timings,
    title,
)


def make(shell: Shell, size: int) -> bytearray:
    title(f"A disk of {size // MIB} MiB with a partition table and mixed content")
    model = make_disk(size, seed=8)
    raw = shell.folder / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, 4096):
            page = model[at : at + 4096]
            if page.count(0) != len(page):
                file.seek(at)
                file.write(page)
    print(f"  wrote {raw.name}: {raw.stat().st_blocks * 512 // MIB} MiB of {size // MIB} in use")
    if shutil.which("sfdisk"):
        table = json.loads(subprocess.check_output(["sfdisk", "--json", raw], text=True))
        parts = table["partitiontable"]["partitions"]
        prove([p["name"] for p in parts] == ["EFI System", "root", "data"], "sfdisk's partitions")
        print(f"  sfdisk reads it: {', '.join(p['name'] for p in parts)}")
    else:
        print("  (sfdisk is not installed, so it was not asked about the partition table)")
    return model


def convert(shell: Shell, model: bytearray) -> None:
    title("To qcow2, with progress")
    ours = shell("diskwright measure -f raw -O qcow2 disk.raw")
    if has_qemu():
        prove(shell("qemu-img measure -f raw -O qcow2 disk.raw") == ours, "qemu-img says the same")
    shell("diskwright convert -p -f raw -O qcow2 disk.raw base.qcow2")
    shell("diskwright info base.qcow2")
    shell("diskwright check base.qcow2")
    shell("diskwright compare -p -f raw -F qcow2 disk.raw base.qcow2")
    prove_disk(shell.folder / "base.qcow2", model, "base.qcow2")
    oracle(shell, "base.qcow2", "disk.raw")
    shell("diskwright dd -f qcow2 -O raw bs=1M skip=16 count=24 if=base.qcow2 of=part.raw")
    prove_file(shell.folder / "part.raw", model[16 * MIB : 24 * MIB], "eight MiB from the 16th on")


def overlay(shell: Shell, model: bytearray) -> bytearray:
    title("An overlay: the base stays as it is")
    shell("diskwright create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2")
    print("  What an image names is opened below its own folder, or nowhere:")
    shell('diskwright io --policy untrusted -r -c "read 0 512" overlay.qcow2', expect=1)
    shell(
        'diskwright io --policy trusted -c "write -P 0x5a 1M 1M" -c "write -P 0x11 5000k 777" '
        '-c "write -z 24M 3M" -c "discard 40M 2M" -c flush overlay.qcow2'
    )
    above = bytearray(model)
    above[MIB : 2 * MIB] = b"\x5a" * MIB
    above[5000 << 10 : (5000 << 10) + 777] = b"\x11" * 777
    above[24 * MIB : 27 * MIB] = bytes(3 * MIB)
    above[40 * MIB : 42 * MIB] = bytes(2 * MIB)

    title("The same by the Python API: 600 small writes at random places")
    import diskwright

    rng = random.Random(16)
    start = time.monotonic()
    path = str(shell.folder / "overlay.qcow2")
    with diskwright.open(path, writable=True, policy="trusted") as disk:
        for _ in range(600):
            data = rng.randbytes(rng.choice((1, 512, 4096, 30_000)))
            at = rng.randrange(len(above) - len(data))
            disk.write_at(at, data)
            above[at : at + len(data)] = data
        disk.flush()
    timings.append(("600 writes by the Python API", time.monotonic() - start))
    prove_disk(shell.folder / "overlay.qcow2", above, "overlay.qcow2 over base.qcow2")
    prove_disk(shell.folder / "base.qcow2", model, "base.qcow2, which nobody wrote to")
    shell("diskwright check --policy trusted overlay.qcow2")
    # Its words are not shown: they would read as if a proof had failed.
    line = "diskwright compare --policy trusted base.qcow2 overlay.qcow2"
    said = shell(line, expect=1, show=0).split("offset ")[-1].split("!")[0]
    at = first_difference(model, above)
    prove(said in (str(at), str(at // SECTOR * SECTOR)), "the first difference", said)
    print(f"    (they differ from offset {said} on, as they should)")
    parts = json.loads(shell("diskwright map --policy trusted --output=json overlay.qcow2", show=3))
    prove(sum(p["length"] for p in parts) == len(above), "map covers the whole disk")
    prove({p["depth"] for p in parts} >= {0, 1}, "map shows both layers")
    return above


def commit(shell: Shell, above: bytearray) -> None:
    title("Committed into the base, and back to raw")
    shell("diskwright commit --policy trusted -p overlay.qcow2")
    prove_disk(shell.folder / "base.qcow2", above, "base.qcow2 after commit")
    shell("diskwright check base.qcow2")
    shell("diskwright convert -p -f qcow2 -O raw base.qcow2 back.raw")
    prove_file(shell.folder / "back.raw", above, "back.raw")
    oracle(shell, "base.qcow2", "back.raw")
