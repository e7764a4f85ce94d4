"""Commands of the io language about the disk itself: open, close, size, map, breakpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..engine.kernel import BaseDriver
from ..errors import DiskError, ImageError, UsageError
from ..graph import names
from ..graph.closing import close_disk, explain
from ..graph.gate import Gate
from ..graph.graph import chain, primary
from ..graph.names import Reference
from ..graph.node import Node
from ..graph.opener import open_disk
from ..graph.options import CACHE_MODES, discard_mode
from .io_text import Complaint, cvtnum, getopt, size_text

if TYPE_CHECKING:
    from ..filters.blkdebug import BlkdebugNode
    from .io import Session

AIO_MODES = ("threads", "native", "io_uring")
_ALLOC_STEP = 512


class OpenFailed(DiskError):
    """A disk could not be opened; the text is what qemu-io says."""

    def __init__(self, name: str | None, cause: BaseException) -> None:
        self.cause = cause
        device = f" device {name}" if name is not None else ""
        text = explain(cause)
        if isinstance(cause, ImageError) and cause.file == name:
            text = text.replace(f"{name}: ", "", 1)  # said already
        super().__init__(f"can't open{device}: {text}")


class Opened:
    """How a disk is to be opened, and its node once it is.

    ``name``: what messages call it (None without a file name); ``reference``, ``format`` and
    ``options`` as :func:`open_disk` takes them; ``cache`` a cache mode, ``writethrough`` by
    default; ``snapshot``: what is written goes to a temporary overlay.
    """

    node: Node

    def __init__(self, name: str | None, reference: Reference) -> None:
        self.name = name
        self.reference = reference
        self.format: str | None = None
        self.options: dict[str, Any] = {}
        self.writable = True
        self.cache = "writethrough"
        self.discard = "unmap"
        self.force_share = False
        self.snapshot = False
        self.native = False

    def set_cache(self, text: str) -> None:
        """Choose a cache mode by name."""
        if text not in CACHE_MODES:
            raise UsageError(f"Invalid cache option: {text}")
        self.cache = text

    def set_discard(self, text: str) -> None:
        """Choose what discards do: unmap, on, ignore or off."""
        try:
            self.discard = discard_mode(text)
        except UsageError:
            raise UsageError(f"Invalid discard option: {text}") from None

    def set_aio(self, text: str) -> None:
        """Choose how I/O is issued; taken for compatibility."""
        if text not in AIO_MODES:
            raise UsageError(f"Invalid aio option: {text}")
        self.native = text == "native"

    async def close(self) -> None:
        """Close the disk."""
        await close_disk(self.node)


async def open_disk_as(
    driver: BaseDriver, opened: Opened, gate: Gate, secrets: Mapping[str, bytes] | None = None
) -> None:
    """Open a disk as ``opened`` says and put its node there; raises :class:`OpenFailed`."""
    try:
        if opened.force_share and opened.writable:
            raise UsageError("force-share=on can only be used with read-only images")
        if opened.native and not CACHE_MODES[opened.cache][0]:
            raise UsageError(
                "aio=native was specified, but it requires cache.direct=on, which was not "
                "specified."
            )
        if opened.snapshot:
            from .io_snapshot import open_snapshot

            opened.node = await open_snapshot(driver, opened, gate, secrets)
            return
        opened.node = await open_disk(
            driver,
            opened.reference,
            format=opened.format,
            writable=opened.writable,
            options=opened.options or None,
            cache=opened.cache,
            force_share=opened.force_share,
            gate=gate,
            discard=opened.discard,
            resize=opened.writable,
            secrets=secrets,
        )
    except (OSError, DiskError) as error:
        raise OpenFailed(opened.name, error) from error


def breakpoints(node: Node | None) -> BlkdebugNode | None:
    """The first blkdebug filter on the way from ``node`` down to its bytes."""
    while node is not None:
        if node.driver_name == "blkdebug":
            from ..filters.blkdebug import BlkdebugNode

            return node if isinstance(node, BlkdebugNode) else None
        node = primary(node)
    return None


# -- opening and closing


async def run_open(session: Session, name: str, words: list[str]) -> None:
    """Open a disk."""
    flags = getopt(name, words, "rsCnkUt:d:i:o:")
    if len(flags.operands) > 1:
        raise Complaint("", usage=True)
    path = flags.operands[0] if flags.operands else None
    opened = Opened(path, path if path is not None else {})
    opened.writable = "r" not in flags
    opened.snapshot = "s" in flags
    opened.force_share = "U" in flags
    if "n" in flags:
        opened.cache = "none"
    for letter, choose in (("t", opened.set_cache), ("d", opened.set_discard),
                           ("i", opened.set_aio)):  # fmt: skip
        if letter in flags:
            choose(flags.values[letter])
    opened.native = opened.native or "k" in flags
    if "C" in flags:
        raise UsageError("copy-on-read is not supported by this version")
    if session.opened is not None:
        raise Complaint("file open already, try 'help close'", "report")
    if "o" in flags:
        try:
            opened.options = names.parse_image_opts(flags.values["o"])
        except UsageError as error:
            raise OpenFailed(path, error) from error
    if path is None:
        opened.reference, opened.options = opened.options, {}
    elif opened.options.get("driver") == names.protocol_of(path) != "":
        opened.reference, opened.options = _inside(path, opened.options), {}
    else:
        driver = opened.options.pop("driver", None)
        opened.format = str(driver) if driver is not None else None
    await session.open(opened)


def _inside(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """``path`` with options of its own protocol; one that puts a format into the slot ``image``
    moves what the path names below that."""
    from ..graph.registry import kind

    described = names.from_filename(path)
    image = options.get("image")
    if isinstance(image, dict) and "driver" in image and kind(str(image["driver"])) == "format":
        described["image"] = {"file": described["image"]}
    return names.merged(described, options)


async def run_close(session: Session, name: str, words: list[str]) -> bool:
    """Close the disk."""
    return await session.close()


async def run_reopen(session: Session, name: str, words: list[str]) -> bool:
    """Open the disk again, for reading or writing, in another cache mode, with other options."""
    flags = getopt(name, words, "c:o:rw")
    if flags.operands:
        raise Complaint("", usage=True)
    opened = session.opened
    assert opened is not None
    if "r" in flags and "w" in flags:
        raise Complaint("Only one -r/-w option may be given", "report")
    cache = opened.cache
    if "c" in flags:
        cache = flags.values["c"]
        if cache not in CACHE_MODES:
            raise Complaint(f"Invalid cache option: {cache}", "report")
    options = names.parse_image_opts(flags.values["o"]) if "o" in flags else {}
    writable = _reopen_mode(opened, options, "r" in flags, "w" in flags)
    if "c" in flags and "cache" in options:
        raise Complaint("Cannot set both -c and the cache options", "report")
    _check_changes(opened.node, options)
    await session.drain()
    if not options and cache == opened.cache:
        from ..graph.reopen import reopen

        await reopen(opened.node, writable=writable)
        opened.writable = writable
        return True
    before = (opened.writable, opened.cache, opened.options)
    await opened.close()
    session.opened = None
    opened.writable, opened.cache = writable, cache
    opened.options = names.merged(_without(opened.options, options), options)
    try:
        await session.open(opened)
    except OpenFailed as error:
        opened.writable, opened.cache, opened.options = before
        await session.open(opened)
        raise Complaint(explain(error.cause), "report") from error
    return True


# Options that say one thing together: who gives some of them anew, gives them all.
_TOGETHER = ({"overlap-check"}, {"cache-size", "l2-cache-size", "refcount-cache-size"})


def _without(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` without what belongs together with something in ``new``."""
    given = {name for group in _TOGETHER if group & new.keys() for name in group}
    return {name: value for name, value in old.items() if name not in given}


def _reopen_mode(opened: Opened, options: dict[str, Any], read: bool, write: bool) -> bool:
    if "read-only" not in options:
        return True if write else False if read else opened.writable
    if read or write:
        raise Complaint("Cannot set both -r/-w and 'read-only'", "report")
    return options.pop("read-only") not in (True, "on", "yes", "true", "y")


def _check_changes(node: Node, options: dict[str, Any]) -> None:
    """Raise for options that the disk's driver does not know."""
    from ..graph.registry import driver

    known = {option.name for option in driver(node.driver_name).options}
    known |= {"cache", "discard", "detect-zeroes", "force-share", "auto-read-only", "file"}
    for key in names.flatten(options):
        if key not in known and key.partition(".")[0] not in known:
            raise Complaint(f"Cannot change the option '{key}'", "report")


# -- size and map


async def run_length(session: Session, name: str, words: list[str]) -> None:
    """The size of the disk."""
    session.emit(size_text(session.node.size), "out")


async def run_truncate(session: Session, name: str, words: list[str]) -> None:
    """Change the size of the disk."""
    flags = getopt(name, words, "m:")
    if not flags.operands:
        raise Complaint("", usage=True)
    mode = flags.values.get("m", "off")
    if mode not in ("off", "metadata", "falloc", "full"):
        raise Complaint(f"Invalid preallocation mode '{mode}'", "report")
    await session.node.truncate(cvtnum(flags.operands[0]), mode)


async def run_info(session: Session, name: str, words: list[str]) -> None:
    """Name and facts of the format."""
    node = session.node
    format = getattr(node, "format", None)
    cluster = getattr(format, "cluster_size", 0)
    state = 0
    shift = getattr(format, "l1_shift", None)
    if shift is not None:
        state = -(-node.size >> shift) << shift
    session.emit(f"format name: {node.driver_name}", "out")
    session.emit(f"cluster size: {size_text(cluster)}", "out")
    session.emit(f"vm state offset: {size_text(state)}", "out")
    describe: Callable[[], dict[str, Any]] | None = getattr(format, "info", None)
    specific = describe() if describe is not None else {}
    if specific:
        session.emit("Format specific information:", "out")
        for line in _nested(specific, "    "):
            session.emit(line, "out")


def _nested(data: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in data.items():
        key = key.replace("-", " ")
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_nested(value, indent + "    ")]
        else:
            shown = ("true" if value else "false") if isinstance(value, bool) else value
            lines.append(f"{indent}{key}: {shown}")
    return lines


async def _held(node: Node, start: int, length: int) -> list[tuple[int, int, bool]]:
    """(start, length, held) for a prefix of a range: whether the top layer of the chain, below
    any filters, holds it."""
    from ..graph.status import allocated_above

    top = next(chain(node))
    if top is not node:
        await node.extents(start, length)  # a filter may refuse to say
    return await allocated_above(top, top.child("backing"), start, length)


async def run_alloc(session: Session, name: str, words: list[str]) -> None:
    """How many bytes of a range this image holds itself."""
    node = session.node
    start = cvtnum(words[0])
    count = cvtnum(words[1]) if len(words) > 1 else _ALLOC_STEP
    end = min(start + count, node.size)
    held, at = 0, start
    try:
        while at < end:
            for first, length, allocated in await _held(node, at, end - at):
                held += length if allocated else 0
                at = first + length
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Complaint(f"is_allocated failed: {reason}") from error
    total = max(end - start, 0)
    session.emit(f"{held}/{total} bytes allocated at offset {size_text(start)}", "out")


async def run_map(session: Session, name: str, words: list[str]) -> None:
    """The ranges that this image holds itself, and those that it does not."""
    node = session.node
    at, begin, held = 0, 0, False
    try:
        while at < node.size:
            for first, length, allocated in await _held(node, at, node.size - at):
                if first and allocated != held:
                    _tell_range(session, begin, first, held)
                    begin = first
                held, at = allocated, first + length
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Complaint(f"Failed to get allocation status: {reason}", "report") from error
    if at > begin:
        _tell_range(session, begin, at, held)


def _tell_range(session: Session, begin: int, end: int, held: bool) -> None:
    length, word = end - begin, "   " if held else "not"
    session.emit(
        f"{size_text(length)} ({length:#x}) bytes {word} allocated at offset "
        f"{size_text(begin)} ({begin:#x})",
        "out",
    )


# -- breakpoints


def _filter(session: Session, failure: str) -> BlkdebugNode:
    found = breakpoints(session.node)
    if found is None:
        raise Complaint(f"{failure}: Operation not supported")
    return found


def _known(done: bool, failure: str) -> None:
    if not done:
        raise Complaint(f"{failure}: No such file or directory")


async def run_break(session: Session, name: str, words: list[str]) -> None:
    """Stop the next request that comes to an event."""
    failure = "Could not set breakpoint"
    _known(_filter(session, failure).set_break(words[0], words[1]), failure)


async def run_remove_break(session: Session, name: str, words: list[str]) -> None:
    """Remove a breakpoint; requests that stand there go on."""
    failure = f"Could not remove breakpoint {words[0]}"
    _known(_filter(session, failure).remove_break(words[0]), failure)


async def run_resume(session: Session, name: str, words: list[str]) -> None:
    """Let a stopped request go on."""
    failure = "Could not resume request"
    _known(_filter(session, failure).resume(words[0]), failure)


async def run_wait_break(session: Session, name: str, words: list[str]) -> None:
    """Wait until a request stands at a breakpoint."""
    await _filter(session, "Could not wait for a breakpoint").wait_break(words[0])
