"""A Linux guest whose disk we serve: it boots from it, writes, boots again, and uses a second
disk of ours through its own kernel's NBD client, while QMP changes what is below it."""

from __future__ import annotations

import asyncio
import hashlib
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.cli.main import main
from monitor.running import OURS, daemon
from vm import system
from vm.machine import SECONDS, machine

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="the guest is a Linux of x86-64",
    ),
    pytest.mark.timeout(SECONDS + 60),
]

MIB = 1 << 20
FILES = 24

# The first boot writes until it is told to stop; the second finds it all again, and goes to the
# other disk.  Its network is QEMU's, where the host is 10.0.2.2.
SCRIPT = """
failed() { echo FAILED: $1; sync; poweroff -f; }
sums() { cd $1 && sha256sum * && cd /; }

stty -echo
if [ ! -e /data/sums ]; then
    mkdir -p /data/files
    mount -t tmpfs tmpfs /tmp
    (
        i=0
        until [ -e /tmp/stop -a $i -ge FILES ]; do
            dd if=/dev/urandom of=/data/files/$((i % FILES)) bs=64k count=2 conv=fsync 2>/dev/null
            i=$((i + 1))
        done
        echo $i > /tmp/count
    ) &
    echo WRITING
    read answer
    touch /tmp/stop
    wait
    sums /data/files > /data/sums
    rm /data/files/0
    sync
    fstrim / || failed fstrim
    cat /data/sums
    echo WROTE
    cat /tmp/count
    echo REBOOTS
    mount -o remount,ro /
    reboot -f
fi

cd /data/files && sed -i '/ 0$/d' /data/sums && sha256sum -c -s /data/sums || failed files
cd /
echo FOUND
for module in $MODULES; do insmod /modules/$module; done
ifconfig eth0 10.0.2.15
attach() { nbd-client 10.0.2.2 $1 /dev/nbd0 -N second || failed nbd-client; }
read port
attach $port
mke2fs /dev/nbd0 > /dev/null || failed mke2fs
mount -t ext2 /dev/nbd0 /root || failed mount
cp /data/files/1? /root
umount /root
nbd-client -d /dev/nbd0
attach $port
mount -t ext2 -o ro /dev/nbd0 /root || failed 'mount again'
for i in 10 19; do cmp /root/$i /data/files/$i || failed "file $i"; done
umount /root
nbd-client -d /dev/nbd0
echo ATTACHED
mount -o remount,ro /
poweroff -f
""".replace("FILES", str(FILES))


def tool(*words: Any) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


async def change(qmp: Any) -> None:
    """What management software does below a guest that writes."""
    await qmp.execute(
        "block-dirty-bitmap-add", {"node": "disk", "name": "written", "persistent": True}
    )
    await qmp.execute("blockdev-snapshot-internal-sync", {"device": "disk", "name": "early"})
    while True:  # until the guest has written more
        (found,) = (
            node for node in await qmp.execute("query-named-block-nodes", {"flat": True})
            if node["node-name"] == "disk"
        )  # fmt: skip
        (bitmap,) = found["dirty-bitmaps"]
        if bitmap["count"]:
            break
    overlay = {"node-name": "disk", "snapshot-file": "top.qcow2", "snapshot-node-name": "top"}
    await qmp.execute("blockdev-snapshot-sync", overlay)
    (export,) = await qmp.execute("query-block-exports")
    assert (export["id"], export["shutting-down"]) == ("e", False)
    assert [snapshot["name"] for snapshot in found["image"]["snapshots"]] == ["early"]


def in_partition(image: Path, scratch: Path, offset: int = 0) -> dict[str, str]:
    """The files in the folder of the file system at ``offset`` of a disk, and their sums."""
    raw, target = scratch / "partition", scratch / "files"
    with diskwright.open(image) as disk, raw.open("wb") as file:
        for begin in range(offset, disk.size, MIB):
            file.write(disk.read_at(begin, min(MIB, disk.size - begin)))
    tool("e2fsck", "-fn", raw)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    folder = "/data/files" if offset else "/"
    tool("debugfs", "-R", f"rdump {folder} {target}", raw)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in target.glob("**/*")
        if path.is_file()
    }


def test_a_guest_boots_from_an_overlay(tmp_path: Path, peer: Any) -> None:
    library = pytest.importorskip("qemu.qmp")
    for name in ("qemu-system-x86_64", "qemu-img", "mke2fs", "e2fsck", "debugfs"):
        peer(name)
    system.make(tmp_path / "disk.raw", SCRIPT)
    names = ("base", "disk", "top", "other")
    base, image, top, other = (tmp_path / f"{name}.qcow2" for name in names)
    words = ["convert", "-f", "raw", "-c", "-O", "qcow2", str(tmp_path / "disk.raw"), str(base)]
    assert main("diskwright", words) == 0
    sum_of_base = hashlib.sha256(base.read_bytes()).digest()
    diskwright.overlay(base, image)
    diskwright.create(other, format="qcow2", size=32 * MIB)
    argv = [
        *OURS,
        "--blockdev",
        "file,node-name=file,filename=disk.qcow2,discard=unmap",
        "--blockdev",
        "qcow2,node-name=disk,file=file,discard=unmap",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=disk,name=disk,writable=on",
        "--chardev",
        "socket,id=q,path=q.sock,server=on,wait=off",
        "--monitor",
        "q",
    ]
    port = free_port()
    second = [*OURS, "--nbd-server", f"addr.type=inet,addr.host=localhost,addr.port={port}",
              "--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=other.qcow2",
              "--export", "nbd,id=e,node-name=disk,name=second,writable=on"]  # fmt: skip

    async def run() -> dict[str, str]:
        qmp = library.QMPClient("test")
        await qmp.connect(str(tmp_path / "q.sock"))
        disk = f"nbd,node-name=disk,server.type=unix,server.path={tmp_path}/nbd.sock,export=disk"
        devices = (
            *("-blockdev", f"{disk},discard=unmap", "-device", "virtio-blk-pci,drive=disk"),
            *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"),
        )
        try:
            async with machine(tmp_path, *devices) as guest:
                await guest.until("WRITING")
                await change(qmp)
                await guest.say("")
                sums = dict(line.split()[::-1] for line in await guest.until("WROTE"))
                (count,) = await guest.until("REBOOTS")
                assert int(count) >= FILES == len(sums)
                await guest.until("FOUND")
                await guest.say(str(port))
                await guest.until("ATTACHED")
                return sums
        finally:
            await qmp.disconnect()

    with daemon(argv, tmp_path), daemon(second, tmp_path):
        sums = asyncio.run(run())
    del sums["0"]  # which the guest has removed
    assert in_partition(top, tmp_path, system.PARTITION) == sums
    copied = {name: sum for name, sum in sums.items() if name in map(str, range(10, 20))}
    assert in_partition(other, tmp_path) == copied
    for path in (image, top, other):
        report = diskwright.check(path)
        assert (report.corruptions, report.leaks) == (0, 0)
        assert "No errors were found" in tool("qemu-img", "check", path)
    assert hashlib.sha256(base.read_bytes()).digest() == sum_of_base
    info = diskwright.info(image).to_dict()
    assert [found["name"] for found in info["snapshots"]] == ["early"]
