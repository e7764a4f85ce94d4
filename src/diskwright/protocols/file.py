"""Protocol ``file``: its options, and how it is opened and made by them."""

from __future__ import annotations

from ..declare import Driver, Option
from ..engine.kernel import BaseDriver
from ..errors import UsageError
from ..hints import Any
from .filenode import FileNode
from .opening import CACHE_MODES

__all__ = [
    "CACHE_MODES",
    "DRIVER",
    "DRIVER_CDROM",
    "DRIVER_DEVICE",
    "FileNode",
    "cache_mode",
    "create_file",
    "open_file",
]


def _on(value: Any) -> bool:
    return value in (True, "on", "true", "yes", 1)


def cache_mode(options: dict[str, Any]) -> str:
    """The cache mode that the options name: ``cache``, or ``cache.direct`` and
    ``cache.no-flush``."""
    mode = options.get("cache", "writeback")
    direct, through, unsafe = CACHE_MODES.get(mode, (False, False, False))
    if mode not in CACHE_MODES:
        raise UsageError(f"Invalid cache option: {mode}")
    direct = _on(options.get("cache.direct", direct))
    unsafe = _on(options.get("cache.no-flush", unsafe))
    if unsafe:
        return "unsafe"
    return {
        (False, False): "writeback",
        (True, False): "none",
        (True, True): "directsync",
        (False, True): "writethrough",
    }[direct, through]


async def open_file(driver: BaseDriver, options: dict[str, Any]) -> FileNode:
    """Open by options, as declared in :data:`DRIVER`; ``read-only`` is on by default, as is
    right for whoever does not say."""
    filename = options.get("filename")
    if not filename:
        raise UsageError("The 'file' block driver requires a file name")
    cache = cache_mode(options)
    if options.get("aio") == "native" and not CACHE_MODES[cache][0]:
        raise UsageError(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        )
    create = _on(options.get("create", False))
    node = await FileNode.open(
        driver,
        filename,
        writable=not _on(options.get("read-only", True)),
        cache=cache,
        force_share=_on(options.get("force-share", False)),
        create=create,
        locking=options.get("locking", "auto"),
        discard=options.get("discard", "unmap"),
        auto_read_only=_on(options.get("auto-read-only", False)),
        perms=options.get("perms"),
        shared=options.get("shared"),
        within=options.get("within", ()),
    )
    node.options = dict(options)
    return node


async def create_file(driver: BaseDriver, options: dict[str, Any]) -> FileNode:
    """Make ``filename`` of ``size`` bytes and leave it open; an existing file is emptied once it
    is locked.  Options: see ``create_options`` of :data:`DRIVER`."""
    node = await open_file(driver, {"cache": "writeback", **options, "create": True})
    table, fd = node.table, node.fileno()
    try:
        hint = int(options.get("extent_size_hint", 1 << 20) or 0)
        for row, wanted in (
            (table.no_copy_on_write, _on(options.get("nocow", False))),
            (lambda fd: table.extent_size_hint(fd, hint), hint),
        ):
            if wanted and node.device.kind == "file":
                try:
                    row(fd)
                except OSError:
                    pass  # a hint: most file systems have neither
        size = int(options.get("size", 0) or 0)
        if size:
            await node.truncate(size, options.get("preallocation") or "off")
    except BaseException:
        await node.close()
        raise
    return node


DRIVER = Driver(
    "file",
    "protocol",
    options=(
        Option("filename", "str", "path of the file or device"),
        Option("locking", "enum", "lock the image against other programs", "auto",
               ("auto", "on", "off")),
        Option("aio", "enum", "taken for compatibility: transfers run inline or in threads",
               "threads", ("threads", "native", "io_uring")),
        Option("aio-max-batch", "int", "taken for compatibility", 0),
        Option("drop-cache", "bool", "taken for compatibility", True),
        Option("cache.direct", "bool", "go around the page cache", False),
        Option("cache.no-flush", "bool", "never flush", False),
        Option("discard", "enum", "give discarded space back", "unmap",
               ("ignore", "off", "unmap", "on")),
        Option("read-only", "bool", "open for reading", True),
        Option("auto-read-only", "bool", "open for writing only while somebody writes", False),
        Option("force-share", "bool", "share the image with every other program", False),
    ),
    create_options=(
        Option("size", "size", "Virtual disk size", 0),
        Option("preallocation", "enum", "Preallocation mode (allowed values: off, falloc, full)",
               "off", ("off", "falloc", "full")),
        Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)", False),
        Option("extent_size_hint", "size",
               "Extent size hint for the image file, 0 to disable", 1 << 20),
    ),
    open=open_file,
    create=create_file,
    capabilities=frozenset({"resize", "discard", "zero", "locks"}),
)  # fmt: skip
# The names under which QEMU opens block devices and CD-ROM drives.
DRIVER_DEVICE = DRIVER._replace(name="host_device")
DRIVER_CDROM = DRIVER._replace(name="host_cdrom")
