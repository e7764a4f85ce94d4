"""A small Linux system on a disk: GRUB in front of one ext4 partition, a kernel of Debian's with
the modules that it needs, busybox, and a script as its first process.

Made without root and without a mount: by ``mke2fs -d``, and with GRUB where a BIOS looks for it.
"""

from __future__ import annotations

import lzma
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import find_peer

MIB = 1 << 20
PARTITION = MIB
"""Where the file system begins: behind GRUB's own sectors."""

FOLDER = Path(__file__).parents[2] / ".guest"
"""Debian's packages, unpacked by ``tools/unpack-guest``."""

# What finds the root file system; the rest is loaded from there.
FIRST = ("virtio_pci", "virtio_blk", "ext4")
LATER = ("virtio_net", "nbd")

INITRD = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc  # through which it finds its other commands
mount -t devtmpfs devtmpfs /dev
for module in %s; do insmod /modules/$module; done
until mount -t ext4 /dev/vda1 /root; do sleep 0.1; done
mount --move /dev /root/dev
mount --move /proc /root/proc
exec /bin/busybox switch_root /root /sbin/init
"""

GRUB = """\
set root=(hd0,msdos1)
linux /boot/vmlinuz console=ttyS0 quiet panic=-1 mitigations=off rw
initrd /boot/initrd
boot
"""


def find(pattern: str) -> Path:
    """A file of the unpacked packages."""
    found = sorted(FOLDER.glob(pattern))
    if not found:
        pytest.skip(f"{pattern} of the guest is not installed (`make peers` unpacks it)")
    return found[-1]


def make(disk: Path, script: str, size: int = 96 * MIB) -> None:
    """A raw image of ``size`` bytes that boots and runs ``script``."""
    busybox = find("bin/busybox")
    root = disk.parent / f"{disk.name}.root"
    for name in ("bin", "boot", "dev", "lib64", "modules", "proc", "root", "sbin", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    shutil.copy(find("boot/vmlinuz-*"), root / "boot/vmlinuz")
    first = list(modules(FIRST))
    initrd = {
        "bin/busybox": busybox.read_bytes(),
        "init": (INITRD % " ".join(name for name, _ in first)).encode(),
        **{f"modules/{name}": data for name, data in first},
    }
    (root / "boot/initrd").write_bytes(archive(initrd, ("bin", "dev", "modules", "proc", "root")))
    later = dict(modules(LATER))
    for name, data in later.items():
        (root / "modules" / name).write_bytes(data)
    order = " ".join(name for name in later if name not in dict(first))
    (root / "sbin/init").write_text(f"#!/bin/busybox sh\nMODULES='{order}'\n{script}")
    (root / "sbin/init").chmod(0o755)
    add_program(root, "nbd-client")
    with disk.open("wb") as file:
        file.truncate(size)
        file.write(boot_sectors(disk.parent, size))
    kib = (size - PARTITION) >> 10
    words = ["mke2fs", "-q", "-t", "ext4", "-d", root, "-E", f"offset={PARTITION}", disk, f"{kib}k"]
    subprocess.run(words, check=True, capture_output=True)
    shutil.rmtree(root)


def modules(names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """File names and contents of kernel modules, those that others need first.  What is built
    into the kernel has none."""
    done: set[str] = set()

    def load(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done:
            return
        done.add(name)
        pattern = re.sub("[-_]", "[-_]", name)
        folder = find("lib/modules/*/kernel")
        for path in folder.glob(f"**/{pattern}.ko*"):
            data = path.read_bytes()
            if path.suffix == ".xz":
                data = lzma.decompress(data)
            needed = re.search(rb"\0depends=([^\0]*)", data)
            assert needed, path
            for other in needed[1].decode().split(","):
                yield from load(other) if other else ()
            yield path.name.removesuffix(".xz"), data

    for name in names:
        yield from load(name)


def archive(files: dict[str, bytes], folders: tuple[str, ...]) -> bytes:
    """What a kernel unpacks as its first file system: cpio, "new ASCII"."""
    out = bytearray()

    def add(name: str, mode: int, data: bytes, device: int = 0) -> None:
        label = name.encode() + b"\0"
        fields = [len(out), mode, 0, 0, 1, 0, len(data), 0, 0, 5 * device, device, len(label), 0]
        out.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + label)
        out.extend(bytes(-len(out) % 4) + data)
        out.extend(bytes(-len(out) % 4))

    for name in folders:
        add(name, 0o40755, b"")
    add("dev/console", 0o20600, b"", 1)  # character device 5:1
    for name, data in files.items():
        add(name, 0o100755, data)
    add("TRAILER!!!", 0, b"")
    return bytes(out)


def boot_sectors(scratch: Path, size: int) -> bytes:
    """The first sectors of the disk: GRUB, and one partition.

    As GRUB makes them, the first sector loads the second, and that one what follows it.
    """
    config, core = scratch / "grub.cfg", scratch / "core.img"
    config.write_text(GRUB)
    grub = find("usr/lib/grub/i386-pc")
    words = [find("usr/bin/grub-mkimage"), "-d", grub, "-O", "i386-pc", "-p", "/boot", "-c", config]
    found = ["biosdisk", "part_msdos", "ext2", "linux"]
    subprocess.run([*words, "-o", core, *found], check=True, capture_output=True)
    sector = bytearray((grub / "boot.img").read_bytes())
    begin, count = PARTITION // 512, (size - PARTITION) // 512
    entry = struct.pack("<B3xB3xII", 0x80, 0x83, begin, count)
    sector[440:] = struct.pack("<IH", 0x6B736964, 0) + entry + bytes(48) + b"\x55\xaa"
    assert len(sector) == 512
    image = bytes(sector) + core.read_bytes()
    assert len(image) <= PARTITION
    return image


def add_program(root: Path, name: str) -> None:
    """A program of this machine, and the libraries that it is linked with."""
    path = find_peer(name)
    shutil.copy(path, root / "bin")
    linked = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"(/\S+) \(0x", linked):
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, root / library[1:])
