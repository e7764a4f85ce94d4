"""The main job, shown and proved: make a disk, convert, overlay, write, commit, compare, serve;
and the migration: the same disk as VHDX, as VMDK and back.

Every command is printed as one would type it.  Every byte is proved against a model in memory,
and against qemu-img where that is installed.  The word "mismatch" appears only when a proof fails
(and then the exit status is 1).  Nothing outside its own temporary folder is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

MIB = 1 << 20
SECTOR = 512
LINUX_DATA = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
EFI_SYSTEM = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
WORDS = b"kernel: eth0 link up sda1 mounted cron session opened accepted publickey for root".split()

SOURCES = Path(__file__).resolve().parent.parent / "src"
if SOURCES.is_dir():  # run from a checkout, without installing anything
    sys.path.insert(0, str(SOURCES))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
    )

failures: list[str] = []
proofs = 0
timings: list[tuple[str, float]] = []


# --- the disk that the demo makes: a GUID partition table and mixed content ----------------------


def gpt_header(here: int, there: int, last: int, entries_at: int, entries: bytes) -> bytes:
    """A GPT header (UEFI specification, 5.3.2), padded to its sector."""

    def packed(crc: int) -> bytes:
        return b"".join(
            (
                b"EFI PART",
                (0x00010000).to_bytes(4, "little"),
                (92).to_bytes(4, "little"),
                crc.to_bytes(4, "little"),
                bytes(4),
                here.to_bytes(8, "little"),
                there.to_bytes(8, "little"),
                (34).to_bytes(8, "little"),
                last.to_bytes(8, "little"),
                UUID("6f0c3a52-95d6-4d5c-8d2e-0d5c1a7e0001").bytes_le,
                entries_at.to_bytes(8, "little"),
                (128).to_bytes(4, "little"),
                (128).to_bytes(4, "little"),
                zlib.crc32(entries).to_bytes(4, "little"),
            )
        )

    return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")


def partition_table(disk: bytearray, partitions: Sequence[tuple[UUID, int, int, str]]) -> None:
    """Write a protective MBR and both copies of the GPT for (type, first, last, name)."""
    sectors = len(disk) // SECTOR
    entry = bytes((0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF)) + (1).to_bytes(4, "little")
    disk[446:462] = entry + (sectors - 1).to_bytes(4, "little")
    disk[510:512] = b"\x55\xaa"
    entries = b""
    for number, (kind, first, last, name) in enumerate(partitions, 1):
        unique = UUID(int=0x6F0C3A5295D64D5C8D2E0D5C1A7E1000 + number)
        entries += kind.bytes_le + unique.bytes_le + first.to_bytes(8, "little")
        entries += last.to_bytes(8, "little") + bytes(8)
        entries += name.encode("utf-16-le").ljust(72, b"\0")
    entries = entries.ljust(128 * 128, b"\0")
    end = sectors - 34
    disk[SECTOR : 2 * SECTOR] = gpt_header(1, sectors - 1, end, 2, entries)
    disk[2 * SECTOR : 34 * SECTOR] = entries
    disk[-33 * SECTOR : -SECTOR] = entries
    disk[-SECTOR:] = gpt_header(sectors - 1, 1, end, sectors - 33, entries)


def make_disk(size: int, seed: int) -> bytearray:
    """Text that compresses, bytes that do not, short patterns, and long empty stretches."""
    rng = random.Random(seed)
    disk = bytearray(size)
    end = size // SECTOR - 34
    partition_table(
        disk,
        [
            (EFI_SYSTEM, 2048, 2048 + 32767, "EFI System"),
            (LINUX_DATA, 2048 + 32768, end - end // 4, "root"),
            (LINUX_DATA, end - end // 4 + 1, end, "data"),
        ],
    )
    text = b"\n".join(b"%08d " % n + b" ".join(rng.choices(WORDS, k=6)) for n in range(40_000))
    at = 2 * MIB
    while at < size - 8 * MIB:
        kind = rng.randrange(5)
        length = rng.randrange(64 << 10, 3 * MIB)
        if kind == 0:
            disk[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            part = text[: min(length, len(text))]
            disk[at : at + len(part)] = part
        elif kind == 2:
            disk[at : at + 4096] = bytes([rng.randrange(1, 256)]) * 4096
        elif kind == 3:
            part = rng.randbytes(97) * (length // 97)
            disk[at : at + len(part)] = part
        at += length + rng.choice((0, 512, 65536, 5 * MIB))
    return disk


# --- running commands and proving bytes --------------------------------------------------------


class Shell:
    """Runs commands in the demo's folder, printing each as a person would type it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if k != "DISKWRIGHT_POLICY"}

    def __call__(self, line: str, *, expect: int = 0, show: int = 12) -> str:
        """Run ``line``; its error output (and a progress line) goes to the screen as it comes."""
        print(f"  $ {line}", flush=True)
        words = shlex.split(line)
        live = "-p" in words
        start = time.monotonic()
        done = subprocess.run(
            self.command(words),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=None if live else subprocess.PIPE,
            stderr=None if live else subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        timings.append((line, time.monotonic() - start))
        text = done.stdout or ""
        lines = text.splitlines()
        for out in lines[:show]:
            print(f"    {out}")
        if len(lines) > show > 0:
            print(f"    ... ({len(lines) - show} more lines)")
        prove(done.returncode == expect, f"`{line}` ended with {expect}", f"{done.returncode}")
        return text

    def command(self, words: list[str]) -> list[str]:
        if words[0] == "diskwright":
            return [sys.executable, "-m", "diskwright", *words[1:]]
        return words


def prove(ok: bool, what: str, found: str = "") -> None:
    global proofs
    proofs += 1
    if not ok:
        failures.append(what)
        print(f"  MISMATCH: {what}{f' (found {found})' if found else ''}", flush=True)


def first_difference(a: bytes | bytearray, b: bytes | bytearray) -> int:
    """The offset of the first byte that differs, or -1."""
    if a == b:
        return -1
    for at in range(0, max(len(a), len(b)), MIB):
        if a[at : at + MIB] != b[at : at + MIB]:
            pairs = zip(a[at : at + MIB], b[at : at + MIB], strict=False)
            return at + next((n for n, (x, y) in enumerate(pairs) if x != y), 0)
    return -1


def prove_disk(path: Path, model: bytearray, what: str, size: int = 0) -> None:
    """Read all of an image through the Python API and compare it with the model.  A ``size``
    beyond that of the model reads as zeroes there."""
    import diskwright

    size = size or len(model)
    with diskwright.open(str(path), policy="trusted") as disk:
        prove(disk.size == size, f"{what}: size", str(disk.size))
        wrong = -1
        for at in range(0, size, 8 * MIB):
            length = min(8 * MIB, size - at)
            want = model[at : at + length].ljust(length, b"\0")
            got = disk.read(at, length)
            if got != want:
                wrong = at + first_difference(bytes(got), want)
                break
    digest = hashlib.sha256(model).hexdigest()[:16]
    prove(wrong < 0, f"{what}: every byte is the model's", f"difference at {wrong}")
    if wrong < 0:
        print(f"  proved: {what}: {size // MIB} MiB, sha256 {digest}...")


def prove_file(path: Path, model: bytearray, what: str) -> None:
    found = path.read_bytes()
    prove(found == model, f"{what}: every byte is the model's", str(first_difference(found, model)))
    if found == model:
        print(f"  proved: {what}: sha256 {hashlib.sha256(found).hexdigest()[:16]}...")


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


# --- the job --------------------------------------------------------------------------------------


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
    shell("diskwright convert -p -f raw -O qcow2 disk.raw base.qcow2")
    shell("diskwright info base.qcow2")
    shell("diskwright check base.qcow2")
    shell("diskwright compare -p -f raw -F qcow2 disk.raw base.qcow2")
    prove_disk(shell.folder / "base.qcow2", model, "base.qcow2")
    oracle(shell, "base.qcow2", "disk.raw")


def oracle(shell: Shell, image: str, raw: str) -> None:
    """qemu-img's opinion of ``image``, which must hold the same bytes as ``raw``."""
    if not shutil.which("qemu-img"):
        print("  (qemu-img is not installed, so it was not asked)")
        return
    format = image.rpartition(".")[2]
    shell(f"qemu-img check {image}", show=1)
    shell(f"qemu-img compare -f raw -F {format} {raw} {image}")


def overlay(shell: Shell, model: bytearray) -> bytearray:
    title("An overlay: the base stays as it is")
    shell("diskwright create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2")
    print("  What an image names is not opened unless the caller trusts it:")
    shell('diskwright io -r -c "read 0 512" overlay.qcow2', expect=1)
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
            disk.write(at, data)
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
    print(f"  {', '.join(files)}: what a descriptor names is not opened either, unless trusted:")
    shell("diskwright info split.vmdk", expect=1)
    shell("diskwright check --policy trusted split.vmdk")
    prove_disk(shell.folder / "split.vmdk", model, "split.vmdk", size)
    os.truncate(shell.folder / "merged.raw", size)
    oracle(shell, "split.vmdk", "merged.raw")

    title("And back to raw")
    shell("diskwright convert -p -f vmdk -O raw sent.vmdk home.raw")
    prove_file(shell.folder / "home.raw", model, "home.raw")


@contextlib.contextmanager
def served(shell: Shell, arguments: str, socket: Path) -> Iterator[str]:
    """`diskwright serve` in the background; ended as a service manager would end it."""
    line = f"diskwright serve {arguments}"
    print(f"  $ {line} &", flush=True)
    process = subprocess.Popen(
        shell.command(shlex.split(line)), cwd=shell.folder, env=shell.env, stdin=subprocess.DEVNULL
    )
    try:
        limit = time.monotonic() + 20
        while not socket.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        prove(socket.exists(), "the socket is there")
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        prove(status == 0, "serve stopped in good order", str(status))


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of the disk")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the images")
    options = parser.parse_args()
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="diskwright-demo-"))
    print(f"Working in {folder}")
    try:
        shell = Shell(folder)
        shell("diskwright --version")
        model = make(shell, max(options.size, 96) * MIB)
        convert(shell, model)
        above = overlay(shell, model)
        commit(shell, above)
        migrate(shell, bytearray(above))
        serve(shell, above)
    finally:
        if options.keep:
            print(f"\nThe images are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    title("Where the time went")
    for line, seconds in sorted(timings, key=lambda t: -t[1])[:6]:
        print(f"  {seconds:6.2f} s  {line[:80]}")
    total = time.monotonic() - start
    if failures:
        print(f"\n{len(failures)} of {proofs} proofs failed, in {total:.0f} s")
        return 1
    print(f"\nAll {proofs} proofs hold; it took {total:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
