"""qcow2: compressed clusters, by zlib and by Zstandard."""

from __future__ import annotations

from content import MIB
from guest import Guest, store
from shell import Shell, has_qemu, oracle, prove, prove_disk, title


def compress(shell: Shell, disk: bytes) -> None:
    title("qcow2: compressed, and written to afterwards")
    sizes = {}
    shell("diskwright convert -p -c -f raw -O qcow2 disk.raw zlib.qcow2")
    sizes["zlib"] = use(shell, "zlib", disk)
    if zstd_is_here():
        shell("diskwright convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw zstd.qcow2")
        sizes["zstd"] = use(shell, "zstd", disk)
    else:
        print("  (no library for Zstandard is installed, so it was left out: the extra `zstd`)")
    used = sum(1 for at in range(0, len(disk), 65536) if any(disk[at : at + 65536])) * 65536
    prove(all(size < used for size in sizes.values()), "compressed is smaller", str(sizes))
    for kind, size in sizes.items():
        print(f"  {kind}: {size / MIB:.1f} MiB for {used / MIB:.1f} MiB of clusters in use")
    if has_qemu():
        shell("qemu-img convert -c -f raw -O qcow2 disk.raw theirs.qcow2")
        prove_disk(shell.folder / "theirs.qcow2", disk, "theirs.qcow2, which qemu-img compressed")


def zstd_is_here() -> bool:
    from diskwright.codecs.zstd import Zstd
    from diskwright.errors import UnsupportedFeature

    try:
        Zstd().pack(b"x")
    except UnsupportedFeature:
        return False
    return True


def use(shell: Shell, kind: str, disk: bytes) -> int:
    """Prove a compressed image, overwrite some of it; the length it had at first."""
    image = f"{kind}.qcow2"
    length = (shell.folder / image).stat().st_size
    prove_disk(shell.folder / image, disk, image)
    oracle(shell, image, "disk.raw")
    guest = Guest(disk)
    guest.write(0x21, 3 * MIB, 65536, "-c")
    guest.write(0x22, 20 * MIB + 1000, 3000)
    guest.write(0x23, 30 * MIB, MIB)
    guest.zero(31 * MIB, MIB)
    guest.discard(32 * MIB, MIB)
    shell(f"diskwright io {guest.commands()} {image}", show=0)
    prove_disk(shell.folder / image, guest.data, f"{image}, written to")
    store(shell.folder / "model.raw", guest.data)
    oracle(shell, image, "model.raw")
    return length
