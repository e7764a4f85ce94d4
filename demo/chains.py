"""qcow2: a long chain of overlays, read, shortened, committed."""

from __future__ import annotations

import json
import random

from content import MIB
from guest import Kept, store
from shell import Shell, has_qemu, oracle, prove, prove_disk, title

LAYERS = 24
MIDDLE = 12


def chain(shell: Shell, disk: bytes) -> None:
    title(f"qcow2: a chain of {LAYERS} overlays, each with data of its own")
    model, models = bytearray(disk), {}
    shell("diskwright convert -f raw -O qcow2 disk.raw layer00.qcow2")
    for number in range(1, LAYERS + 1):
        overlay(shell, number, model)
        if number in (MIDDLE, MIDDLE + 1):
            models[number] = Kept(shell.folder / f"{number}.model", model)
    models[LAYERS] = Kept(shell.folder / f"{LAYERS}.model", model)
    print(f"  made layer01.qcow2 to layer{LAYERS}.qcow2 by the Python API, each over the last one")
    top = f"layer{LAYERS}.qcow2"
    prove_disk(shell.folder / top, model, f"{top} through {LAYERS} files")
    line = f"diskwright map --policy trusted --output=json {top}"
    depths = {part["depth"] for part in json.loads(shell(line, show=2))}
    prove(depths == set(range(LAYERS + 1)), "map shows all layers", str(depths))

    title("qcow2: the upper half moved onto the base; the lower half committed")
    shell(f"diskwright rebase --policy trusted -b layer00.qcow2 -F qcow2 {layer(MIDDLE + 1)}")
    shell(f"diskwright check --policy trusted {layer(MIDDLE + 1)}")
    prove_disk(shell.folder / top, model, f"{top} after rebase")
    shell(f"diskwright convert --policy trusted -O qcow2 {top} flat.qcow2")
    store(shell.folder / "model.raw", model)
    oracle(shell, "flat.qcow2", "model.raw")
    if has_qemu():
        shell(f"qemu-img compare -f raw -F qcow2 model.raw {top}")
    for number in (MIDDLE + 1, LAYERS):  # their base is about to change
        shell(f'diskwright rebase --policy trusted -b "" {layer(number)}')
        prove_disk(shell.folder / layer(number), models[number], f"{layer(number)} by itself")
    shell(f"diskwright commit --policy trusted -b layer00.qcow2 -d {layer(MIDDLE)}")
    prove_disk(shell.folder / "layer00.qcow2", models[MIDDLE], "layer00.qcow2 after commit")
    store(shell.folder / "model.raw", models[MIDDLE][:])
    oracle(shell, "layer00.qcow2", "model.raw")


def layer(number: int) -> str:
    return f"layer{number:02}.qcow2"


def overlay(shell: Shell, number: int, model: bytearray) -> None:
    """Make an overlay with some writes, which are made to ``model`` as well."""
    import diskwright

    rng = random.Random(number)
    options = {"backing_file": layer(number - 1), "backing_fmt": "qcow2"}
    path = shell.folder / layer(number)
    diskwright.create(path, format="qcow2", options=options, policy="trusted")
    with diskwright.open(path, writable=True, policy="trusted") as disk:
        for _ in range(8):
            data = rng.randbytes(rng.choice((4096, 65536, 200_000)))
            at = rng.randrange(len(model) - len(data))
            disk.write_at(at, data)
            model[at : at + len(data)] = data
        at = rng.randrange(len(model) // MIB) * MIB
        disk.zero(at, MIB, unmap=True)
        model[at : at + MIB] = bytes(MIB)
