"""What stands below a disk changes while fio writes to it and reads it back: no byte is lost, and
what must be refused is."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diskwright.cli.main import main
from export.test_fuse import pytestmark as needs_fuse
from monitor.running import OURS, Client, daemon, needs_unix

pytestmark = needs_unix

MIB = 1 << 20
SIZE = 8 * MIB

FIO = ("fio", "--name=load", "--rw=randwrite", "--bsrange=4k-32k", f"--size={SIZE}", "--rate=8m",
       "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--randrepeat=0",
       "--verify_state_save=0")  # fmt: skip


class Disk:
    """An exported disk whose top layer is ``top``, and what is done to it."""

    def __init__(self, client: Client, folder: Path, kind: str) -> None:
        self.client = client
        self.folder = folder
        self.kind = kind
        self.size = SIZE
        self.count = 0
        self.images: list[Path] = []
        self.top = self.add("disk", str(SIZE))
        client.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        (folder / "file").touch()
        self.export("load", kind, True)

    @property
    def fio(self) -> list[str]:
        """How the load is brought to it."""
        if self.kind == "fuse":
            return [*FIO, "--ioengine=psync", f"--filename={self.folder}/file"]
        uri = f"nbd+unix:///load?socket={self.folder}/nbd.sock"
        return [*FIO, "--ioengine=nbd", "--iodepth=8", f"--uri={uri}"]

    @property
    def name(self) -> str:
        """The node that the export is of."""
        return str(self.top["node-name"])

    def add(self, name: str, *words: str) -> dict[str, Any]:
        """A new image as a node; its options."""
        path = self.folder / f"{name}.qcow2"
        create = ["create", "-q", "-f", "qcow2", *words[:-1], str(path), words[-1]]
        assert main("qemu-img", create) == 0
        self.images.append(path)
        file = {"driver": "file", "node-name": f"{name}-file", "filename": path.name,
                "auto-read-only": True}  # fmt: skip
        options = {"driver": "qcow2", "node-name": name, "file": file}
        self.done("blockdev-add", {**options, "backing": None})
        return {**options, "file": file["node-name"]}

    def done(self, name: str, arguments: dict[str, Any]) -> None:
        reply = self.client.send(name, arguments)
        assert "return" in reply, reply

    def refused(self, name: str, arguments: dict[str, Any], why: str) -> None:
        assert why in self.client.send(name, arguments)["error"]["desc"]

    def export(self, id: str, kind: str = "nbd", writable: bool = False) -> None:
        words = {"type": kind, "id": id, "node-name": self.name, "writable": writable}
        more = {"mountpoint": "file"} if kind == "fuse" else {"name": id}
        self.done("block-export-add", {**words, **more})

    # -- what is done
    def replace(self) -> None:
        """An overlay takes the disk's place."""
        self.count += 1
        backing = ("-u", "-b", f"{self.name}.qcow2", "-F", "qcow2")
        above = self.add(f"over{self.count}", *backing, str(self.size))
        self.done("blockdev-snapshot", {"node": self.name, "overlay": above["node-name"]})
        self.top = {**above, "backing": self.name}

    def reopen(self) -> None:
        """In another cache mode; not read-only, for there is who writes."""
        self.count += 1
        options = {**self.top, "cache": {"no-flush": bool(self.count % 2)}}
        self.done("blockdev-reopen", {"options": [options]})
        options["read-only"] = True
        self.refused("blockdev-reopen", {"options": [options]}, "cannot support read-write users")

    def insert(self) -> None:
        """Another node comes between the image and its file, and goes again."""
        options = {"driver": "raw", "node-name": "between", "file": self.top["file"]}
        self.done("blockdev-add", options)
        self.done("blockdev-reopen", {"options": [{**self.top, "file": "between"}]})
        self.done("blockdev-reopen", {"options": [self.top]})
        self.done("blockdev-del", {"node-name": "between"})

    def together(self) -> None:
        """With a node that cannot be opened so, which is found last: nothing changes."""
        spare = {"driver": "raw", "node-name": "spare", "file": {"driver": "null-co", "size": 512}}
        self.done("blockdev-add", spare)
        spare["size"] = 1024
        top = {**self.top, "detect-zeroes": "on", "cache": {"direct": True}}
        self.refused("blockdev-reopen", {"options": [top, spare]}, "has to be smaller")
        self.done("blockdev-del", {"node-name": "spare"})

    def resize(self) -> None:
        """Clients of an NBD server were told a size; a file may grow."""
        words = {"node-name": self.name, "size": self.size + MIB}
        if self.kind == "nbd":
            self.refused("block_resize", words, "Permission conflict")
            return
        self.done("block_resize", words)
        self.size += MIB
        assert (self.folder / "file").stat().st_size == self.size

    def snapshot(self) -> None:
        """Inside the image, with a bitmap of the same moment; both are given up again."""
        device, bitmap = {"device": self.name, "name": "s"}, {"node": self.name, "name": "b"}
        kinds = {"blockdev-snapshot-internal-sync": device, "block-dirty-bitmap-add": bitmap}
        actions = [{"type": type, "data": data} for type, data in kinds.items()]
        self.done("transaction", {"actions": actions})
        self.done("blockdev-snapshot-delete-internal-sync", device)
        self.done("block-dirty-bitmap-remove", bitmap)

    def export_again(self) -> None:
        """Another export comes and goes."""
        if self.kind == "nbd":
            self.export("other")
            self.done("block-export-del", {"id": "other"})

    def keep(self) -> None:
        """What is in use is not given up, nor to other processes."""
        self.refused("blockdev-del", {"node-name": self.name}, "in use")
        command = ["qemu-img", "info", self.images[-1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "lock" in done.stderr


@pytest.mark.parametrize("rounds", [1, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["nbd", pytest.param("fuse", marks=needs_fuse)])
def test_changes_under_load(tmp_path: Path, kind: str, rounds: int, peer: Any) -> None:
    for name in ("fio", "qemu-img"):
        peer(name)
    with daemon(OURS, tmp_path) as (_, (client,)):
        try:
            images = changed(Disk(client, tmp_path, kind), rounds)
        finally:
            if kind == "fuse":  # also when the daemon is killed
                subprocess.run(["fusermount3", "-u", "-z", tmp_path / "file"])
    for image in images:
        words = ["check", "-q", str(image)]
        assert main("qemu-img", words) == subprocess.run(["qemu-img", *words]).returncode == 0


def changed(disk: Disk, rounds: int) -> list[Path]:
    """All images, after at least so many rounds of changes while fio ran."""
    changes: list[Callable[[], None]] = [
        disk.reopen, disk.snapshot, disk.export_again, disk.replace, disk.insert, disk.together,
        disk.resize, disk.keep,
    ]  # fmt: skip
    todo = itertools.cycle(changes)
    done = 0
    while done < rounds * len(changes):
        fio = subprocess.Popen(disk.fio, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while fio.poll() is None:
            next(todo)()
            done += 1
        output = fio.communicate()[0].decode()
        assert fio.returncode == 0, output
    return disk.images
