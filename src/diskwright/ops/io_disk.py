"""Commands of the io language that open, close and reopen the disk."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.kernel import BaseDriver
from ..errors import DiskError, ImageError, UsageError
from ..graph import names
from ..graph.closing import close_disk, explain
from ..graph.gate import Gate
from ..graph.names import Reference
from ..graph.node import Node
from ..graph.opener import open_disk
from ..graph.options import CACHE_MODES, discard_mode
from ..hints import TYPE_CHECKING, Any
from .io_text import Complaint, getopt

if TYPE_CHECKING:
    from .io import Session

AIO_MODES = ("threads", "native", "io_uring")


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
