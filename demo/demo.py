"""The main job, shown and proved: make a disk, convert, overlay, write, commit, compare; every
feature of qcow2 on the same disk; the migration to VHDX, to VMDK and back; and serving it.

Every command is printed as one would type it.  Every byte is proved against a model in memory,
and against qemu-img where that is installed.  The word "mismatch" appears only when a proof fails
(and then the exit status is 1).  Nothing outside its own temporary folder is touched.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import shell as shells
from amending import amend
from bitmaps import track
from chains import chain
from compression import compress
from content import MIB
from encryption import encrypt
from job import commit, convert, make, overlay
from layouts import lay_out
from migration import migrate
from rescue import rescue
from serving import serve
from shell import Shell, timings, title
from snapshots import snapshot

LEAST = 160
"""MiB of the disk, if no more are asked for."""

QCOW2: tuple[Callable[[Shell, bytes], None], ...] = (
    compress, lay_out, encrypt, snapshot, track, amend, chain, rescue,
)  # fmt: skip
"""The chapters about qcow2: each begins with ``disk.raw``, and its images are removed after it."""


def main_job(shell: Shell, model: bytearray) -> None:
    convert(shell, model)
    above = overlay(shell, model)
    commit(shell, above)
    serve(shell, bytearray(above))
    migrate(shell, above)


def alone(shell: Shell, chapter: Callable[[Shell, bytes], None], disk: bytes, keep: bool) -> None:
    """One chapter, and none of its files left behind unless they are to be kept."""
    before = set(shell.folder.iterdir())
    chapter(shell, disk)
    if not keep:
        for path in set(shell.folder.iterdir()) - before:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, default=LEAST, metavar="MIB", help="of the disk")
    parser.add_argument("--only", choices=[c.__name__ for c in QCOW2], help="one qcow2 chapter")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the images")
    options = parser.parse_args()
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="diskwright-demo-"))
    print(f"Working in {folder}")
    try:
        shell = Shell(folder)
        shell("diskwright --version")
        disk = bytes(make(shell, max(options.size, LEAST) * MIB))
        if options.only is None:
            main_job(shell, bytearray(disk))
        for chapter in QCOW2:
            if options.only in (None, chapter.__name__):
                alone(shell, chapter, disk, options.keep)
    finally:
        if options.keep:
            print(f"\nThe images are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    title("Where the time went")
    for line, seconds in sorted(timings, key=lambda t: -t[1])[:6]:
        print(f"  {seconds:6.2f} s  {line[:80]}")
    total = time.monotonic() - start
    if shells.failures:
        print(f"\n{len(shells.failures)} of {shells.proofs} proofs failed, in {total:.0f} s")
        return 1
    print(f"\nAll {shells.proofs} proofs hold; it took {total:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
