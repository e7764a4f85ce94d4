"""The migration: the same disk as VHDX, as VMDK and back."""

from __future__ import annotations

import os

from content import MIB
from shell import Shell, oracle, prove, prove_disk, prove_file, title


def migrate(shell: Shell, model: bytearray) -> None:
    title("To Hyper-V: a VHDX")
    shell("diskwright convert -p -f qcow2 -O vhdx base.qcow2 disk.vhdx")
    shell("diskwright info disk.vhdx")
    shell("diskwright check disk.vhdx")
    prove_disk(shell.folder / "disk.vhdx", model, "disk.vhdx")
    oracle(shell, "disk.vhdx", "back.raw")

    title("A differencing VHDX over it, written and committed")
    shell("diskwright create -f vhdx -b disk.vhdx -F vhdx child.vhdx")
    shell(
        'diskwright io --policy trusted -c "write -P 0x3c 7M 3M" -c "write -P 0x2d 30000001 4321" '
        '-c "write -z 50M 2M" -c flush child.vhdx'
    )
    above = bytearray(model)
    above[7 * MIB : 10 * MIB] = b"\x3c" * (3 * MIB)
    above[30_000_001 : 30_000_001 + 4321] = b"\x2d" * 4321
    above[50 * MIB : 52 * MIB] = bytes(2 * MIB)
    prove_disk(shell.folder / "child.vhdx", above, "child.vhdx over disk.vhdx")
    prove_disk(shell.folder / "disk.vhdx", model, "disk.vhdx, which nobody wrote to")
    shell("diskwright check --policy trusted child.vhdx")
    shell("diskwright commit --policy trusted child.vhdx")
    model[:] = above
    (shell.folder / "merged.raw").write_bytes(model)
    prove_disk(shell.folder / "disk.vhdx", model, "disk.vhdx after commit")
    shell("diskwright check disk.vhdx")
    oracle(shell, "disk.vhdx", "merged.raw")

    title("To VMware: a sparse VMDK, and one as a stream in one pass")
    shell("diskwright convert -p -f vhdx -O vmdk disk.vhdx disk.vmdk")
    shell("diskwright convert -p -f vmdk -O vmdk -o subformat=streamOptimized disk.vmdk sent.vmdk")
    for name in ("disk.vmdk", "sent.vmdk"):
        shell(f"diskwright check {name}")
        prove_disk(shell.folder / name, model, name)
        oracle(shell, name, "merged.raw")
    sizes = [(shell.folder / name).stat().st_size // MIB for name in ("disk.vmdk", "sent.vmdk")]
    print(f"  {sizes[0]} MiB as a sparse file, {sizes[1]} MiB as a stream")

    title("Grown past 4 GiB, and in files of 2 GiB")
    size = 4352 * MIB
    shell("diskwright resize -f vmdk disk.vmdk 4352M")
    shell("diskwright convert -p -O vmdk -o subformat=twoGbMaxExtentSparse disk.vmdk split.vmdk")
    files = sorted(path.name for path in shell.folder.glob("split*"))
    prove(len(files) == 4, "a descriptor and three extents", ", ".join(files))
    print(f"  {', '.join(files)}: what a descriptor names is not opened either, with no trust:")
    shell("diskwright info --policy untrusted split.vmdk", expect=1)
    shell("diskwright check --policy trusted split.vmdk")
    prove_disk(shell.folder / "split.vmdk", model, "split.vmdk", size)
    os.truncate(shell.folder / "merged.raw", size)
    oracle(shell, "split.vmdk", "merged.raw")

    title("And back to raw")
    shell("diskwright convert -p -f vmdk -O raw sent.vmdk home.raw")
    prove_file(shell.folder / "home.raw", model, "home.raw")
