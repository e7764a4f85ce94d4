"""``mount``: a disk as a raw file, by FUSE."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import UsageError
from .images import arguments, gate, new_driver, secrets, served, warn_if_guessed
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, Args, Opt
from .output import Call, UsageProblem, reason

if TYPE_CHECKING:
    from ..engine.kernel import Driver
    from ..graph.node import Node

OPTIONS = (
    FORMAT,
    IMAGE_OPTS,
    Opt("r", "read-only", "", "let nobody write"),
    Opt("l", "load-snapshot", "SNAPSHOT", "mount an internal snapshot, read-only: an id or name, "
        "or snapshot.id=ID,snapshot.name=NAME"),
    Opt("", "growable", "", "let the file be truncated, and writes behind its end enlarge it"),
    Opt("", "allow-other", "", "let other users open it, too, as its mode says (chmod)"),
    Opt("", "cache", "CACHE", "cache mode of the image (default writeback)"),
    Opt("", "fork", "", "return when the file can be used, and go on in the background"),
    Opt("", "pid-file", "PATH", "write the process's id there"),
    FORCE_SHARE,
    *GATE,
    OBJECT,
)  # fmt: skip


def main(call: Call, argv: list[str]) -> int:
    """Show a disk as a file until that is unmounted or a signal comes."""
    summary = "Show a disk as the raw file FILE, which must be there, until it is unmounted."
    args = arguments(call, argv, OPTIONS, "FILENAME FILE", summary)
    if args is None:
        return 0
    if len(args.operands) != 2:
        raise UsageProblem("Expecting an image file name and a file to mount it over")
    if not os.path.lexists(args.operands[1]):
        raise UsageError(f"There is no file '{args.operands[1]}' to mount over: 'touch' it first")
    if "fork" in args:
        from .background import in_background

        return in_background(call, lambda ready: _mount(call, args, ready))
    _mount(call, args, lambda: None)
    return 0


def _mount(call: Call, args: Args, ready: Callable[[], None]) -> None:
    driver = new_driver()
    try:
        driver.run(driver.in_time(_serve(driver, call, args, ready)))
    finally:
        driver.close()


async def _open(driver: Driver, call: Call, args: Args, writable: bool) -> Node:
    from ..graph.opener import open_disk

    reference, cache = served(args, args.operands[0])
    return await open_disk(
        driver,
        reference,
        format=args.get("format"),
        writable=writable,
        cache=cache,
        force_share="force-share" in args,
        gate=gate(args),
        resize=writable and "growable" in args,
        secrets=secrets(args),
    )


async def _serve(driver: Driver, call: Call, args: Args, ready: Callable[[], None]) -> None:
    from ..engine.kernel import Future
    from ..export.fuse import DiskFile
    from ..export.fuse_mount import Mount
    from ..export.nbd_service import until_signalled
    from ..graph.opener import close_disk
    from ..ops.info import actual_size
    from .background import unlink, write_pid

    image, name = args.operands
    writable = not ("read-only" in args or "load-snapshot" in args)
    node = await _open(driver, call, args, writable)
    pid_file = args.get("pid-file")
    try:
        from .convert import snapshot_of

        snapshot = snapshot_of(call, args, "load-snapshot") if "load-snapshot" in args else None
        if snapshot is not None:
            from ..ops.snapshots import show

            await show(node, snapshot)
        if writable:
            warn_if_guessed(call, image, node)
        file = DiskFile(node, writable=writable, growable="growable" in args, allocated=actual_size)
        mount = Mount(driver, file, name, "on" if "allow-other" in args else "off")
        mount.on_error = lambda error: call.error(f"a request failed: {reason(error)}")
        over: Future[None] = Future()
        mount.ended.callbacks.append(lambda _: over.set())

        async def work() -> None:
            await mount.start()
            try:
                if pid_file:
                    write_pid(pid_file)
                if sys.stdout.isatty():
                    print(f"{name} is the disk; end: fusermount3 -u {name}, or Ctrl-C", flush=True)
                ready()
                await over
            finally:
                await mount.stop()
                if pid_file:
                    unlink(pid_file)

        await until_signalled(driver, work(), over.set)
    finally:
        await close_disk(node)
