"""Serving the disk over NBD to clients of others."""

from __future__ import annotations

import random
import shlex
import shutil

from content import MIB
from shell import Shell, oracle, prove, prove_disk, prove_file, served, title


def serve(shell: Shell, model: bytearray) -> None:
    title("Served over NBD to clients that we did not write")
    clients = [c for c in ("nbdinfo", "nbdcopy", "qemu-img", "qemu-io") if shutil.which(c)]
    if not {"nbdcopy", "qemu-img"} & set(clients):
        print("  (neither nbdcopy nor qemu-img is installed, so nothing was served)")
        return
    print(f"  clients found: {', '.join(clients)}")
    shell("diskwright create -f qcow2 -b base.qcow2 -F qcow2 served.qcow2")
    socket = shell.folder / "nbd.sock"
    arguments = "--policy trusted -t -e 8 -f qcow2 -k nbd.sock served.qcow2"
    with served(shell, arguments, socket) as uri:
        if "nbdinfo" in clients:
            size = shell(f"nbdinfo --size '{uri}'").strip()
            prove(size == str(len(model)), "the size that nbdinfo sees", size)
        for name, line in (
            ("nbdcopy", f"nbdcopy '{uri}' from-nbdcopy.raw"),
            ("qemu-img", f"qemu-img convert -f raw -O raw '{uri}' from-qemu.raw"),
        ):
            if name in clients:
                shell(line)
                prove_file(shell.folder / shlex.split(line)[-1], model, f"what {name} read")
        if "qemu-io" in clients:
            shell(f"qemu-io -f raw -c 'write -P 0x77 9M 2M' -c 'write -z 12M 1M' -c flush '{uri}'")
            model[9 * MIB : 11 * MIB] = b"\x77" * (2 * MIB)
            model[12 * MIB : 13 * MIB] = bytes(MIB)
        if "nbdcopy" in clients:
            fresh = shell.folder / "fresh.raw"
            rng = random.Random(32)
            for _ in range(32):
                at = rng.randrange(0, len(model) - MIB)
                model[at : at + MIB] = rng.randbytes(MIB)
            fresh.write_bytes(model)
            shell(f"nbdcopy --flush fresh.raw '{uri}'")
    prove(not socket.exists(), "the socket is gone after the stop")
    shell("diskwright check --policy trusted served.qcow2")
    prove_disk(shell.folder / "served.qcow2", model, "served.qcow2, written by the clients")
    if shutil.which("qemu-img"):
        (shell.folder / "final.raw").write_bytes(model)
        oracle(shell, "served.qcow2", "final.raw")
